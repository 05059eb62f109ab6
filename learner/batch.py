"""Plans a step: which groups form each minibatch, which rank computes what, and in which micro-batches.

Everything is decided once, on the driver, from numbers alone (`SAMPLES`); the ranks only carry it out.  What is learnt
does not depend on the deal: minibatches are chosen before ranks are looked at, and every count a loss is divided by is
the minibatch's global one.

    groups a, b, c, d (2 samples each), 2 minibatches, 2 ranks
    permutation of (seed, step, epoch)      c a | d b        whole groups, the same for any number of ranks
    pieces of the first minibatch           a (9 tokens), c (20 tokens, above the budget of 16) -> c0 (12), c1 (11)
    longest first to the least loaded rank  rank 0: c0       rank 1: c1, a
    first fit under the budget              [c0] []          [c1] [a]         rank 0 pads with an empty micro-batch
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from learner.packing import balance, first_fit_decreasing
from learner.schedule import learning_rate_at

if TYPE_CHECKING:
    from learner.config import LearnerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some samples of one group that share a row: the prompt once, then their responses."""

    group: int
    """Index into `StepPlan.group_ids`."""
    samples: tuple[int, ...]
    """Sample indices, ascending."""


Microbatch = tuple[Piece, ...]
"""What one forward-backward computes; an empty one keeps a rank in step with the others."""

Deal = tuple[tuple[Microbatch, ...], ...]
"""For each rank its micro-batches, equally many on every rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One optimizer update: a minibatch of whole groups."""

    epoch: int
    minibatch: int
    num_sequences: int
    """Samples in the minibatch, over all ranks."""
    num_tokens: int
    """Loss tokens in the minibatch, over all ranks."""
    learning_rate: float
    ranks: Deal


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepPlan:
    """Everything the ranks must agree on before they start a step."""

    step: int
    group_ids: tuple[str, ...]
    """Sorted; `Piece.group` counts in this order."""
    group_sizes: tuple[int, ...]
    """Samples of each group."""
    scores: np.ndarray
    """[B] float64, composed scores in the order of (group_ids, sample index)."""
    kl_coef: float
    baseline: float
    """Moving average of earlier steps' scores, 0 where nothing asks for it."""
    updates: tuple[Update, ...]
    """In the order they are carried out: epoch by epoch, minibatch by minibatch."""
    value_ranks: Deal
    """The deal of the pass without gradient (values, old log-probs) over the whole batch, every sample once."""

    @property
    def offsets(self) -> tuple[int, ...]:
        """Position in `scores` of each group's sample 0."""
        return tuple(int(end) - size for end, size in zip(np.cumsum(self.group_sizes), self.group_sizes, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """Where in the run a step stands."""

    step: int
    """From 1."""
    num_steps: int
    """Steps of the whole run: the schedules end with it."""
    seed: int
    """The run's seed."""
    kl_coef: float
    baseline: float = 0.0
    """See `StepPlan`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """Sizes of the batch's groups, in the order of `ids`."""

    ids: tuple[str, ...]
    prompt_tokens: tuple[int, ...]
    response_tokens: tuple[tuple[int, ...], ...]
    loss_tokens: tuple[int, ...]

    def tokens(self, piece: Piece) -> int:
        """Trunk tokens of a piece: its prompt once and its responses."""
        return self.prompt_tokens[piece.group] + sum(self.response_tokens[piece.group][i] for i in piece.samples)


def identity_order(samples: pa.Table) -> np.ndarray:
    """Return the row numbers of `samples` in the order of (group_id, sample_index), [B] int64."""
    keys = [("group_id", "ascending"), ("sample_index", "ascending")]
    return pc.sort_indices(samples, sort_keys=keys).to_numpy().astype(np.int64)


def plan_step(samples: pa.Table, scores: np.ndarray, *, learner: "LearnerConfig", context: StepContext) -> StepPlan:
    """Fix minibatches, deal and micro-batches of one step.

    Args:
        samples: SAMPLES, rows in any order; every group complete.
        scores: [B] composed scores in the row order of `samples`.
        learner: Epochs, minibatches, ranks, token budget, learning-rate schedule.
        context: The step's place in the run.

    Returns:
        The plan: independent of the row order, and in its minibatches independent of the number of ranks.

    Raises:
        ValueError: on an incomplete group, a sample without a token to learn from, fewer groups than minibatches, or a
            step outside the run.
    """
    order = identity_order(samples)
    groups = _read_groups(samples.take(pa.array(order)))
    _check_sizes(groups, scores, learner=learner, context=context)
    pieces = [_split(group, groups, budget=learner.microbatch_tokens) for group in range(len(groups.ids))]
    return StepPlan(
        step=context.step,
        group_ids=groups.ids,
        group_sizes=tuple(len(lengths) for lengths in groups.response_tokens),
        scores=np.ascontiguousarray(scores, dtype=np.float64)[order],
        kl_coef=context.kl_coef,
        baseline=context.baseline,
        updates=tuple(_plan_updates(pieces, groups, learner=learner, context=context)),
        value_ranks=_deal([piece for split in pieces for piece in split], groups, learner),
    )


def _read_groups(samples: pa.Table) -> _Groups:
    """Collect sizes by group from a table in identity order, checking that each group is whole."""
    ids: list[str] = []
    prompt_tokens: list[int] = []
    response_tokens: list[list[int]] = []
    loss_tokens: list[int] = []
    names = ("group_id", "sample_index", "num_prompt_tokens", "num_response_tokens", "num_loss_tokens")
    for group_id, index, prompt, response, loss in zip(*(samples[name].to_pylist() for name in names), strict=True):
        if not ids or ids[-1] != group_id:
            ids.append(group_id)
            prompt_tokens.append(prompt)
            response_tokens.append([])
            loss_tokens.append(0)
        _check_row(
            f"group {group_id!r}, sample {index}", (index, len(response_tokens[-1])), (prompt, prompt_tokens[-1])
        )
        if not 1 <= loss <= response:
            raise ValueError(
                f"num_loss_tokens must be between 1 and num_response_tokens = {response}, got {loss} "
                f"(group {group_id!r}, sample {index}); quarantine a sample without a token to learn from"
            )
        response_tokens[-1].append(response)
        loss_tokens[-1] += loss
    responses = tuple(tuple(lengths) for lengths in response_tokens)
    return _Groups(
        ids=tuple(ids), prompt_tokens=tuple(prompt_tokens), response_tokens=responses, loss_tokens=tuple(loss_tokens)
    )


def _check_row(where: str, index: tuple[int, int], prompt: tuple[int, int]) -> None:
    found, expected = index
    if found != expected:
        raise ValueError(
            f"sample indices of a group must be 0..n-1, each once, got {found} where {expected} is due ({where}); "
            "give the learner complete groups only"
        )
    if prompt[0] != prompt[1]:
        raise ValueError(f"a group must share one prompt, got {prompt[0]} and {prompt[1]} prompt tokens ({where})")


def _check_sizes(groups: _Groups, scores: np.ndarray, *, learner: "LearnerConfig", context: StepContext) -> None:
    num_samples = sum(len(lengths) for lengths in groups.response_tokens)
    if scores.shape != (num_samples,):
        raise ValueError(f"scores must have one entry for each of {num_samples} samples, got shape {scores.shape}")
    if len(groups.ids) < learner.num_minibatches:
        raise ValueError(
            f"a batch must have at least learner.num_minibatches = {learner.num_minibatches} groups, got "
            f"{len(groups.ids)} (step {context.step}); a minibatch holds whole groups"
        )
    if not 1 <= context.step <= context.num_steps:
        raise ValueError(f"step must be between 1 and run.num_steps = {context.num_steps}, got {context.step}")


def _minibatches(num_groups: int, num_minibatches: int, context: StepContext, epoch: int) -> list[list[int]]:
    """Cut a seeded permutation of the groups into minibatches whose sizes differ by at most one group.

    Sorting raw Philox words, instead of asking a Generator for a permutation, keeps the order the same in every numpy.
    """
    entropy = (context.seed % 2**64, context.step, epoch)
    words = np.random.Philox(np.random.SeedSequence(entropy)).random_raw(num_groups)
    cuts = np.array_split(np.argsort(words, kind="stable"), num_minibatches)
    return [sorted(int(group) for group in cut) for cut in cuts]


def _split(group: int, groups: _Groups, *, budget: int) -> list[Piece]:
    """Cut a group into pieces within the budget; a sample that is above it alone is a piece of its own."""
    bins = first_fit_decreasing(groups.response_tokens[group], budget - groups.prompt_tokens[group])
    return sorted((Piece(group=group, samples=tuple(members)) for members in bins), key=lambda piece: piece.samples)


def _plan_updates(
    pieces: Sequence[Sequence[Piece]], groups: _Groups, *, learner: "LearnerConfig", context: StepContext
) -> Iterator[Update]:
    updates_per_step = learner.epochs * learner.num_minibatches
    total, index = context.num_steps * updates_per_step, (context.step - 1) * updates_per_step
    for epoch in range(learner.epochs):
        for minibatch, members in enumerate(_minibatches(len(groups.ids), learner.num_minibatches, context, epoch)):
            yield Update(
                epoch=epoch,
                minibatch=minibatch,
                num_sequences=sum(len(groups.response_tokens[group]) for group in members),
                num_tokens=sum(groups.loss_tokens[group] for group in members),
                learning_rate=learning_rate_at(index, total, learner.optimizer),
                ranks=_deal([piece for group in members for piece in pieces[group]], groups, learner),
            )
            index += 1


def _deal(pieces: Sequence[Piece], groups: _Groups, learner: "LearnerConfig") -> Deal:
    """Spread pieces over the ranks, pack each rank's into micro-batches, pad the ranks to one count."""
    sizes = [groups.tokens(piece) for piece in pieces]
    packed: list[list[Microbatch]] = []
    for members in balance(sizes, learner.num_ranks):
        bins = first_fit_decreasing([sizes[i] for i in members], learner.microbatch_tokens)
        packed.append([tuple(pieces[members[i]] for i in bin_) for bin_ in bins])
    count = max(len(microbatches) for microbatches in packed)
    return tuple((*microbatches, *((),) * (count - len(microbatches))) for microbatches in packed)
