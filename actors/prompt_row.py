"""What one row of a prompt data set must be, and how it becomes a row of PROMPTS."""

import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from actors.dataset import RawRow
from actors.encoding import Prompt, check_messages, dump_prompt, parse_prompt
from actors.schema import PROMPTS

ID_COLUMNS = ("prompt_id", "id")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """A well-formed row: its prompt, its identity (given, or a hash of the content) and its other columns."""

    prompt: Prompt
    prompt_id: str
    is_id_given: bool
    extras: str  # one JSON object

    @property
    def identity_hash(self) -> int:
        """64 bits by which equal identities are found; given and content-made ones never meet."""
        text = f"{'given' if self.is_id_given else 'content'}:{self.prompt_id}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

    def table(self, prompt_ids: Sequence[int], *, occurrence: int) -> pa.Table:
        """Return one row of PROMPTS; a repeated content gets its occurrence number as suffix."""
        row = {
            "prompt_id": f"{self.prompt_id}-{occurrence}" if occurrence else self.prompt_id,
            "prompt": dump_prompt(self.prompt),
            "prompt_ids": prompt_ids,
            "extras": self.extras,
        }
        return pa.Table.from_pylist([row], schema=PROMPTS)


def parse_row(row: RawRow) -> PromptRow:
    """Return the parts of a row.

    Raises:
        ValueError: that says what is wrong with it.
    """
    if row.error:
        raise ValueError(row.error)
    columns = dict(row.value)
    if columns.get("prompt") is None:
        raise ValueError(f"prompt must be there, got columns {sorted(columns)}; rename the column")
    prompt = _prompt(columns.pop("prompt"))
    given = _take_id(columns)
    try:
        extras = json.dumps(columns, sort_keys=True, default=_iso_format)
    except TypeError as error:
        raise ValueError(f"columns must be numbers, strings, lists or objects: {error}") from error
    identity = _content_hash(prompt, extras) if given is None else given
    return PromptRow(prompt=prompt, prompt_id=identity, is_id_given=given is not None, extras=extras)


def _prompt(value: Any) -> Prompt:
    if not isinstance(value, str | list):
        raise ValueError(f"prompt must be a string or a list of messages, got {type(value).__name__}")
    parsed = parse_prompt(value) if isinstance(value, str) else value
    prompt = parsed if isinstance(parsed, str) else _messages(parsed)
    contents = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    if not contents[-1].strip():
        raise ValueError("prompt must not be empty, got no visible character")
    for text in contents:
        check_unicode(text, "prompt")
    return prompt


def _messages(value: list[Any]) -> Prompt:
    if not value:
        raise ValueError("prompt must not be empty, got no messages")
    # Parquet gives all messages of a column the same keys, null where a message has none.
    messages = check_messages([_without_nulls(message) for message in value])
    if messages[-1]["role"] == "assistant":
        raise ValueError("prompt must end with a message to answer, got one of the assistant")
    return messages


def _without_nulls(message: Any) -> Any:
    return {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else message


def _take_id(columns: dict[str, Any]) -> str | None:
    for name in ID_COLUMNS:
        if columns.get(name) is None:
            columns.pop(name, None)
            continue
        value = columns.pop(name)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise ValueError(f"{name} must be a non-empty string or an integer, got {value!r:.80}")
        check_unicode(str(value), name)
        return str(value)
    return None


def check_unicode(text: str, what: str) -> None:
    """Refuse lone surrogates, which JSON can spell and UTF-8 cannot.

    Raises:
        ValueError: naming the character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} must be valid Unicode, got {text[error.start]!r} at {error.start}") from error


def _iso_format(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(f"got {type(value).__name__}")


def _content_hash(prompt: Prompt, extras: str) -> str:
    return hashlib.blake2b(json.dumps([prompt, extras]).encode(), digest_size=8).hexdigest()
