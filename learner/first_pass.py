"""What the networks say about a step's batch before its first update: values, old and reference log-probs.

Two ways to the same numbers:

* a pass without gradient over the whole batch, the work shared over the ranks;
* where the step's first update is of the whole batch, its own forward passes: their graphs are kept until the targets
  are known, so nothing is computed twice.  They hold memory, so only the first micro-batches within
  `learner.first_epoch_bytes` are kept; the rest takes the other way.  Where only values are asked for and a separate
  critic has them, only its graphs are kept: the policy's forward pass comes right before its backward pass.

How many graphs are kept depends on the memory that is left, what comes out does not, to the last bit.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from actors.memory import available_bytes
from actors.rows import GroupRow, PromptGroup, split_responses
from learner.batch import Microbatch, StepPlan
from learner.experience import FirstPass
from learner.networks import Forward, Networks
from learner.reference import Reference
from learner.samples import Sample, prompt_groups, sample_indices

_EMPTY = (PromptGroup(prompt_ids=[0], responses=[[0]]),)
"""What an empty micro-batch computes, with weight 0: sharded parameters are gathered by all ranks together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A micro-batch and what the current networks say about it, with gradient."""

    row: GroupRow
    forward: Forward


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """A context manager that counts the bytes which the graphs built inside it hold, the networks' weights aside."""

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        self.total = 0
        self._seen = {weight.untyped_storage().data_ptr() for weight in weights}
        super().__init__(self._count, lambda tensor: tensor)

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:  # several operations save the same one
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


class BatchScorer:
    """Runs a rank's micro-batches through its networks.

    Args:
        networks: the rank's.
        reference: one that lives with the learner, or None.
        records_are_old: whether recorded log-probs are the old policy's.
        kept_bytes: of graphs that may be kept; 0 = none.  None = on a CPU half of the memory that is left when the
            first graph has been built, a rank's share of it; on a GPU one micro-batch, whose backward pass must fit
            anyway.
    """

    def __init__(
        self, networks: Networks, reference: Reference | None, *, records_are_old: bool, kept_bytes: int | None
    ) -> None:
        self._networks = networks
        self._reference = reference
        self._has_logprobs = not records_are_old
        self._needs_forward = networks.has_values or self._has_logprobs
        # the policy's own forward pass is not needed before the targets, and costs the same later
        self._keeps_tokens = self._has_logprobs or networks.critic is None
        self._kept_bytes = kept_bytes if self._needs_forward and networks.keeps_graphs else 0
        self._most_tokens = math.inf  # of which graphs are kept; infinity = no graph was measured yet

    def score(self, microbatch: Microbatch, samples: Sequence[Sample], plan: StepPlan, kept: deque[Scored]) -> Scored:
        """Run one micro-batch, with gradient; or take what is left of it where it is the first of those kept."""
        if not kept:
            row = self._row(microbatch, samples, plan)
            return Scored(row=row, forward=self._networks.forward(row))
        scored = kept.popleft()
        if self._keeps_tokens:
            return scored
        return Scored(row=scored.row, forward=self._networks.forward(scored.row, values=scored.forward.values))

    def first_pass(self, samples: Sequence[Sample], plan: StepPlan) -> tuple[list[FirstPass], deque[Scored]]:
        """Compute what the step's targets need; collective.

        Returns:
            of every sample what the networks say, and this rank's first micro-batches of the first update, in order,
            whose graphs are kept.
        """
        kept: deque[Scored] = deque()
        if not self._needs_forward and self._reference is None:
            return [_without_networks(sample) for sample in samples], kept
        rank = self._networks.policy.rank
        may_keep = self._kept_bytes != 0 and plan.updates[0].ranks == plan.value_ranks
        num_tokens = 0
        mine: dict[int, FirstPass] = {}
        for microbatch in plan.value_ranks[rank]:
            row = self._row(microbatch, samples, plan)
            num_tokens += row.input_ids.numel()
            forward = None
            if self._needs_forward and may_keep and (not kept or num_tokens <= self._most_tokens):
                forward = self._with_graph(row, kept)
                kept.append(Scored(row=row, forward=forward))
            elif self._needs_forward:
                with torch.no_grad():
                    forward = self._networks.forward(row, has_tokens=self._has_logprobs)
            indices = sample_indices(microbatch, plan)
            mine |= dict(zip(indices, self._parts(row, forward, [samples[i] for i in indices]), strict=True))
        merged: dict[int, FirstPass] = {}
        for part_of_rank in self._networks.policy.all_gather(mine):
            merged |= part_of_rank
        return [merged[index] for index in range(len(samples))], kept

    def _with_graph(self, row: GroupRow, kept: Sequence[Scored]) -> Forward:
        """Run a row whose graph is kept beside others; the first one ever says how many there will be."""
        occupied = sum(self._networks.softmax_bytes(scored.row) for scored in kept)
        if self._most_tokens < math.inf:
            return self._networks.forward(row, has_tokens=self._keeps_tokens, occupied_bytes=occupied)
        saved = SavedBytes(self._networks.weights())
        with saved:
            forward = self._networks.forward(row, has_tokens=self._keeps_tokens, occupied_bytes=occupied)
        self._most_tokens = self._bytes_for_graphs(saved.total) * row.input_ids.numel() / max(1, saved.total)
        return forward

    def _bytes_for_graphs(self, present: int) -> int:
        """Return how many bytes graphs may hold; `present` is what there is of them."""
        if self._kept_bytes is not None:
            return self._kept_bytes
        if self._networks.device.type != "cpu":
            return present
        return present + available_bytes() // (2 * self._networks.policy.world_size)

    def _parts(self, row: GroupRow, forward: Forward | None, members: Sequence[Sample]) -> list[FirstPass]:
        """Return what a row's responses are told; an empty micro-batch's has no members, and the zips drop it."""
        parts = [_without_networks(member) for member in members]
        if forward is not None and self._networks.has_values:
            values = _split(forward.values, [length + 1 for length in row.lengths])
            parts = [replace(part, values=value) for part, value in zip(parts, values, strict=False)]
        if forward is not None and self._has_logprobs:
            old = _split(forward.logprobs, row.lengths)
            parts = [replace(part, logprobs=logprobs) for part, logprobs in zip(parts, old, strict=False)]
        if self._reference is not None:
            theirs = _split(self._reference.logprobs(row), row.lengths)
            parts = [replace(part, ref_logprobs=logprobs) for part, logprobs in zip(parts, theirs, strict=False)]
        return parts

    def _row(self, microbatch: Microbatch, samples: Sequence[Sample], plan: StepPlan) -> GroupRow:
        groups = prompt_groups(microbatch, samples, plan) or _EMPTY
        return self._networks.module.scorer.row(groups).to(self._networks.device)


def _split(values: torch.Tensor, lengths: Sequence[int]) -> tuple[torch.Tensor, ...]:
    return split_responses(values.detach().cpu(), lengths)


def _without_networks(sample: Sample) -> FirstPass:
    return FirstPass(values=torch.zeros(sample.logprobs.shape[0] + 1))
