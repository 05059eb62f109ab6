"""Logged text as training data of the offline algorithms: pairs for DPO, scored trajectories for learning values.

Three kinds of rows, recognised by their columns:

    preferences   prompt, chosen, rejected        two trajectories, scores +1 and -1
    ratings       prompt, completion, rating      one trajectory, score = rating
    rollouts      SCORED, a run's rollouts/       one trajectory, score = weighted sum of the judges' components

A rollout's token ids are taken as they are: they are what was sampled, so nothing is encoded again.  Pairs of rated
responses are made within one prompt, where ratings can be compared.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.dataset import Dataset, Quarantined, RawRow
from actors.encoding import PromptEncoder
from actors.schema import FINISH_REASONS
from learner.judgements import parse_preference
from learner.offline_config import ScoreConfig
from learner.sft import ExampleParser
from learner.training import read_examples

Kind = Literal["preferences", "ratings", "rollouts"]

_PREFERENCES = frozenset({"chosen", "rejected"})
_RATINGS = frozenset({"rating"})
_ROLLOUTS = frozenset(
    {"prompt_id", "prompt_ids", "response_ids", "response_text", "loss_mask", "finish_reason", "components"}
)
_SEED_OF_PAIRS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """A response and what it is worth; the whole score belongs to its last token."""

    prompt_ids: list[int]
    response_ids: list[int]
    is_learnt: list[bool]
    """False on tokens that the policy did not choose: an environment's, a user's."""
    score: float
    is_terminal: bool
    """False when the response was cut off, so that more could have followed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two responses to a prompt, of which one is better."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_is_learnt: list[bool]
    rejected_is_learnt: list[bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What one row says: responses to one prompt with their scores; in a preference the chosen one comes first."""

    prompt_key: str
    """Equal for responses whose scores can be compared."""
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineData:
    """A data set that was read."""

    kind: Kind
    judged: list[Judged]
    quarantined: list[Quarantined]

    @property
    def trajectories(self) -> list[Trajectory]:
        """All responses, in the order of their rows."""
        return [trajectory for judged in self.judged for trajectory in judged.trajectories]


def read_offline_data(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, score: ScoreConfig, *, max_tokens: int, strict: bool
) -> OfflineData:
    """Read a data set of any kind; rows that are wrong are left out and named.

    Args:
        dataset: its first readable row says of which kind it is.
        tokenizer: of the policy that is trained.
        score: how rollouts are scored.
        max_tokens: longest prompt with response.
        strict: make a wrong row an error.

    Raises:
        ValueError: if there is no good row, the kind is unknown, or a setting belongs to another kind.
    """
    kind = recognise(dataset)
    if kind != "rollouts" and (score.weights or score.missing_eos_penalty is not None):
        raise ValueError(
            f"score.weights and score.missing_eos_penalty must not be set for {kind}, they belong to rollouts "
            f"({dataset.path}); remove them"
        )
    if kind == "preferences" and score.standardize:
        raise ValueError(f"score.standardize must be false for preferences, scored +1 and -1 ({dataset.path})")
    parse = RowParser(kind, tokenizer, score, max_tokens=max_tokens)
    judged, quarantined = read_examples(dataset, parse, strict=strict)
    unknown = sorted(set(score.weights) - parse.components)
    if unknown:
        raise ValueError(
            f"score.weights must name components of the rollouts, got {unknown} for {sorted(parse.components)} "
            f"({dataset.path}); correct the names"
        )
    return OfflineData(kind=kind, judged=judged, quarantined=quarantined)


def recognise(dataset: Dataset) -> Kind:
    """Return of which kind a data set is, by the columns of its first readable row.

    Raises:
        ValueError: if they are of no kind.
    """
    columns: set[str] = set()
    for row in islice((row for row in dataset if not row.error), 1):
        columns = set(row.value)
    if columns >= _PREFERENCES:
        return "preferences"
    if columns >= _ROLLOUTS:
        return "rollouts"
    if columns >= _RATINGS:
        return "ratings"
    raise ValueError(
        f"offline data must have columns chosen and rejected, or rating, or those of a run's rollouts, got "
        f"{sorted(columns)} ({dataset.path}); rename the columns or give other data"
    )


class RowParser:
    """Makes `Judged` of rows of one kind; `components` are the judges' names met in rollouts."""

    def __init__(self, kind: Kind, tokenizer: PreTrainedTokenizerBase, score: ScoreConfig, *, max_tokens: int) -> None:
        self.components: set[str] = set()
        self._encoder = PromptEncoder(tokenizer)
        self._example = ExampleParser(self._encoder, max_tokens=max_tokens)
        self._score = score
        self._max_tokens = max_tokens
        self._num_tokens = len(tokenizer)
        self._parse = {"preferences": self._preference, "ratings": self._rating, "rollouts": self._rollout}[kind]

    def __call__(self, row: RawRow) -> Judged:
        """Return what the row says.

        Raises:
            ValueError: that says what is wrong with it.
        """
        return self._parse(row)

    def _preference(self, row: RawRow) -> Judged:
        preference = parse_preference(row)
        prompt_ids = self._encoder.encode(preference.prompt)
        responses = [self._encoder.encode_completion(text) for text in (preference.chosen, preference.rejected)]
        trajectories = tuple(
            self._checked(prompt_ids, ids, [True] * len(ids), score=score, is_terminal=True)
            for ids, score in zip(responses, (1.0, -1.0), strict=True)
        )
        return Judged(prompt_key=_key(prompt_ids), trajectories=trajectories)

    def _rating(self, row: RawRow) -> Judged:
        rating = row.value.get("rating")
        if isinstance(rating, bool) or not isinstance(rating, int | float) or not math.isfinite(rating):
            raise ValueError(f"rating must be a finite number, got {rating!r:.80}")
        example = self._example(row)
        trajectory = Trajectory(
            prompt_ids=example.prompt_ids,
            response_ids=example.response_ids,
            is_learnt=example.is_trained,
            score=float(rating),
            is_terminal=True,
        )
        return Judged(prompt_key=_key(example.prompt_ids), trajectories=(trajectory,))

    def _rollout(self, row: RawRow) -> Judged:
        missing = sorted(name for name in _ROLLOUTS if row.value.get(name) is None)
        if missing:
            raise ValueError(f"a rollout must have {', '.join(sorted(_ROLLOUTS))}, got none of {', '.join(missing)}")
        value, reason = row.value, row.value["finish_reason"]
        if reason not in FINISH_REASONS:
            raise ValueError(f"finish_reason must be one of {', '.join(FINISH_REASONS)}, got {reason!r:.80}")
        is_cut_off = reason == "length"
        penalty = self._score.missing_eos_penalty
        trajectory = self._checked(
            _ints(value["prompt_ids"], "prompt_ids"),
            _ints(value["response_ids"], "response_ids"),
            list(value["loss_mask"]),
            score=self._composed(value["components"]) - (penalty or 0.0) * is_cut_off,
            is_terminal=not is_cut_off or penalty is not None,
        )
        self._check_tokenizer(trajectory, value["response_text"])
        # A given id may name other prompts in another run, and equal prompts may differ in what their judges are told.
        return Judged(prompt_key=_key(trajectory.prompt_ids, value["prompt_id"]), trajectories=(trajectory,))

    def _composed(self, components: Any) -> float:
        """Return the weighted sum of the components that apply: a map, or a list of pairs as Arrow gives it."""
        pairs = components.items() if isinstance(components, dict) else components
        total, count = 0.0, 0
        for name, value in pairs:
            if value is None or not math.isfinite(value):
                raise ValueError(f"component {name!r} must be a finite number, got {value}")
            self.components.add(name)
            total += self._score.weights.get(name, 1.0) * value
            count += 1
        if not count:
            raise ValueError("a rollout must have at least one component, got none")
        return total

    def _checked(
        self, prompt_ids: list[int], ids: list[int], is_learnt: list[bool], *, score: float, is_terminal: bool
    ) -> Trajectory:
        if not prompt_ids or not ids:
            raise ValueError(f"prompt and response must have at least one token, got {len(prompt_ids)} and {len(ids)}")
        if len(prompt_ids) + len(ids) > self._max_tokens:
            raise ValueError(
                f"an example must have at most {self._max_tokens} tokens, got {len(prompt_ids) + len(ids)}"
            )
        if len(is_learnt) != len(ids) or not any(is_learnt):
            raise ValueError(f"loss_mask must be true on some of {len(ids)} response tokens, got {is_learnt!r:.80}")
        return Trajectory(
            prompt_ids=prompt_ids, response_ids=ids, is_learnt=is_learnt, score=score, is_terminal=is_terminal
        )

    def _check_tokenizer(self, trajectory: Trajectory, text: str) -> None:
        """Refuse the rollouts of a policy with another tokenizer: the same ids would spell something else."""
        spelt: Any = None
        tokenizer, ids = self._encoder.tokenizer, trajectory.response_ids
        if max(*trajectory.prompt_ids, *ids) < self._num_tokens:
            spelt = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if spelt != text:
            raise ValueError(
                f"response_ids must spell response_text with the policy's tokenizer, got {spelt!r:.80} for "
                f"{text!r:.80}; start from the policy that the run trained"
            )


def standardized(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Return the trajectories with scores of mean 0 and population standard deviation 1; equal scores become 0."""
    scores = np.array([trajectory.score for trajectory in trajectories])
    scores = (scores - scores.mean()) / max(float(scores.std()), 1e-12)
    return [replace(t, score=float(score)) for t, score in zip(trajectories, scores, strict=True)]


def preference_pairs(judged: Sequence[Judged]) -> list[Pair]:
    """Return one pair for each preference."""
    return [_pair(*row.trajectories) for row in judged]


def rated_pairs(judged: Sequence[Judged], *, limit: int | None, seed: int) -> tuple[list[Pair], int]:
    """Make pairs of the better and the worse response to the same prompt.

    Prompt p with scores 2, 1, 1 and prompt q with one response: two pairs (2 over each 1), one tie, and none for q.

    Args:
        judged: one response each.
        limit: pairs for each prompt, drawn by seed without repetition; None = all.
        seed: of the draw; what a prompt gets depends on its own responses and its place among the prompts.

    Returns:
        the pairs, prompt by prompt in order of appearance; and how many couples are ties and left out: equal scores, or
        the same tokens, which say nothing about each other.
    """
    groups: dict[str, list[Trajectory]] = {}
    for row in judged:
        groups.setdefault(row.prompt_key, []).extend(row.trajectories)
    pairs: list[Pair] = []
    num_ties = 0
    for number, group in enumerate(groups.values()):
        ranked = sorted(group, key=lambda trajectory: trajectory.score)
        random = np.random.default_rng([seed % 2**63, _SEED_OF_PAIRS, number])
        drawn, num_equal = _couples(np.array([trajectory.score for trajectory in ranked]), limit, random)
        made = [_pair(ranked[better], ranked[worse]) for better, worse in drawn]
        pairs += [pair for pair in made if pair.chosen_ids != pair.rejected_ids]
        num_ties += num_equal + sum(pair.chosen_ids == pair.rejected_ids for pair in made)
    return pairs, num_ties


def _couples(scores: np.ndarray, limit: int | None, random: np.random.Generator) -> tuple[list[tuple[int, int]], int]:
    """Return (better, worse) positions in ascending `scores`, and the number of couples with equal scores.

    Couples are numbered by their better position; only those that are drawn are ever made.  Scores 1, 1, 2 have below =
    0, 0, 2 lower scores each, so couples 0 and 1 both have position 2 as the better one.
    """
    below = np.searchsorted(scores, scores, side="left")
    starts = np.cumsum(below) - below
    total = int(below.sum())
    numbers = np.arange(total)
    if limit is not None and limit < total:
        numbers = np.sort(random.choice(total, size=limit, replace=False))
    better = np.searchsorted(starts + below, numbers, side="right")
    worse = numbers - starts[better]
    num_equal = len(scores) * (len(scores) - 1) // 2 - total
    return list(zip(better.tolist(), worse.tolist(), strict=True)), num_equal


def _pair(chosen: Trajectory, rejected: Trajectory) -> Pair:
    return Pair(
        prompt_ids=chosen.prompt_ids,
        chosen_ids=chosen.response_ids,
        rejected_ids=rejected.response_ids,
        chosen_is_learnt=chosen.is_learnt,
        rejected_is_learnt=rejected.is_learnt,
    )


def _key(prompt_ids: Sequence[int], prompt_id: str = "") -> str:
    return json.dumps([prompt_id, list(prompt_ids)])


def _ints(values: Any, what: str) -> list[int]:
    if not isinstance(values, list) or not all(isinstance(value, int) and value >= 0 for value in values):
        raise ValueError(f"{what} must be a list of token ids, got {values!r:.80}")
    return values
