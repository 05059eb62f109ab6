"""Human judgement as training rows: ratings of texts, preferences between two responses, and harm of two responses."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from actors.dataset import RawRow
from actors.encoding import Prompt, check_messages, dump_prompt, parse_prompt
from actors.prompt_row import check_unicode

Part = Literal["train", "validation", "test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """A text and how people rated it."""

    text: str
    rating: float

    @property
    def split_key(self) -> str:
        """What must not be in two parts: the text."""
        return self.text.strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Two responses to a prompt, of which people chose one."""

    prompt: Prompt
    chosen: str
    rejected: str

    @property
    def split_key(self) -> str:
        """What must not be in two parts: the prompt, with all its pairs."""
        return dump_prompt(self.prompt).strip()

    @property
    def ordered(self) -> tuple[str, str]:
        """The response that must score higher, and the other."""
        return self.chosen, self.rejected


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetyJudgement:
    """Two responses to a prompt, of which people found one safer, and whether each is safe by itself."""

    prompt: Prompt
    safer: str
    less_safe: str
    safer_is_safe: bool
    less_safe_is_safe: bool

    @property
    def split_key(self) -> str:
        """What must not be in two parts: the prompt, with all its pairs."""
        return dump_prompt(self.prompt).strip()

    @property
    def ordered(self) -> tuple[str, str]:
        """The response that must cost more, and the other."""
        return self.less_safe, self.safer


Judgement = TypeVar("Judgement", Rating, Preference, SafetyJudgement)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split(Generic[Judgement]):
    """Judgements in three parts that share no text (ratings) or prompt (pairs)."""

    train: list[Judgement]
    validation: list[Judgement]
    test: list[Judgement]


def parse_rating(row: RawRow) -> Rating:
    """Return a row with `text` and `rating`.

    Raises:
        ValueError: that says what is wrong with it.
    """
    text, rating = _column(row, "text"), _column(row, "rating")
    if isinstance(rating, bool) or not isinstance(rating, int | float) or not math.isfinite(rating):
        raise ValueError(f"rating must be a finite number, got {rating!r:.80}")
    return Rating(text=_text(text, "text"), rating=float(rating))


def parse_preference(row: RawRow) -> Preference:
    """Return a row with `prompt`, `chosen` and `rejected`.

    Raises:
        ValueError: that says what is wrong with it.
    """
    prompt, chosen, rejected = _pair(row, "chosen", "rejected")
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected)


def parse_safety(row: RawRow) -> SafetyJudgement:
    """Return a row with `prompt`, `safer`, `less_safe`, `safer_is_safe` and `less_safe_is_safe`.

    Raises:
        ValueError: that says what is wrong with it.
    """
    prompt, safer, less_safe = _pair(row, "safer", "less_safe")
    labels = [_column(row, name) for name in ("safer_is_safe", "less_safe_is_safe")]
    for name, label in zip(("safer_is_safe", "less_safe_is_safe"), labels, strict=True):
        if not isinstance(label, bool):
            raise ValueError(f"{name} must be true or false, got {label!r:.80}")
    if labels == [False, True]:
        raise ValueError("the safer response must be safe where the less safe one is, got labels that contradict it")
    return SafetyJudgement(
        prompt=prompt, safer=safer, less_safe=less_safe, safer_is_safe=labels[0], less_safe_is_safe=labels[1]
    )


def split(judgements: Sequence[Judgement], *, held_out_fraction: float, seed: int) -> Split[Judgement]:
    """Deal judgements to three parts by a seeded hash of what must stay together.

    The hash does not look at other rows, so a row keeps its part when rows are added.

    Raises:
        ValueError: if a part is empty.
    """
    parts: dict[Part, list[Judgement]] = {"train": [], "validation": [], "test": []}
    for judgement in judgements:
        parts[_part(judgement.split_key, held_out_fraction, seed)].append(judgement)
    for name, part in parts.items():
        if not part:
            raise ValueError(
                f"the {name} part must have rows, got none of {len(judgements)} with held_out_fraction "
                f"{held_out_fraction}; give more data or another fraction"
            )
    return Split(**parts)


def _part(key: str, fraction: float, seed: int) -> Part:
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    uniform = int.from_bytes(digest, "little") / 2**64
    if uniform < fraction:
        return "test"
    return "validation" if uniform < 2 * fraction else "train"


def _column(row: RawRow, name: str) -> Any:
    if row.value.get(name) is None:
        raise ValueError(f"{name} must be there, got columns {sorted(row.value)}")
    return row.value[name]


def _pair(row: RawRow, one: str, other: str) -> tuple[Prompt, str, str]:
    """Return the prompt and two different responses to it."""
    prompt = _column(row, "prompt")
    if not isinstance(prompt, str | list):
        raise ValueError(f"prompt must be a string or a list of messages, got {type(prompt).__name__}")
    first, second = (_response(_column(row, name), name) for name in (one, other))
    if first == second:
        raise ValueError(f"{one} and {other} must differ, got {first!r:.80} twice")
    parsed = parse_prompt(_text(prompt, "prompt")) if isinstance(prompt, str) else check_messages(prompt)
    return parsed, first, second


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} must be a text that is not empty, got {value!r:.80}")
    check_unicode(value, what)
    return value


def _response(value: Any, what: str) -> str:
    """Return a response given as text or, as in TRL's data sets, as one message of the assistant."""
    if isinstance(value, list):
        messages = check_messages(value)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            raise ValueError(f"{what} must be one message of the assistant, got {value!r:.80}")
        return _text(messages[0]["content"], what)
    return _text(value, what)
