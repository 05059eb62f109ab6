"""The samples of a step as a learner rank reads them from the batch's tables.

They are put into the plan's order, (group_ids, sample index), whatever order the tables came in, so nothing that is
learnt depends on arrival.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from actors.rows import PromptGroup
from actors.schema import check
from learner.batch import Microbatch, StepPlan
from reward.schema import SCORED


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt with one response of R tokens."""

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    logprobs: torch.Tensor
    """[R] float32, recorded when the tokens were sampled."""
    ref_logprobs: torch.Tensor | None
    """[R] float32."""
    policy_versions: torch.Tensor
    """[R] int32."""
    loss_mask: torch.Tensor
    """[R] bool."""
    token_scores: torch.Tensor | None
    """[R] float32, see `reward.schema.SCORED`."""
    finish_reason: str


def read_samples(tables: Sequence[pa.Table], plan: StepPlan) -> list[Sample]:
    """Return the batch's samples in the plan's order.

    Raises:
        ValueError: if the tables do not hold exactly the plan's samples.
        SchemaError: if a table is not SCORED.
    """
    starts = dict(zip(plan.group_ids, plan.offsets, strict=True))
    sizes = dict(zip(plan.group_ids, plan.group_sizes, strict=True))
    found: dict[int, Sample] = {}
    for table in tables:
        check(table, SCORED, "learner step")
        rows = zip(table["group_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
        for row, (group_id, index) in enumerate(rows):
            if group_id not in starts or not 0 <= index < sizes[group_id]:
                raise ValueError(f"a sample must be in the step's plan, got sample {index} of group {group_id!r}")
            if starts[group_id] + index in found:
                raise ValueError(f"a sample must come once, got sample {index} of group {group_id!r} again")
            found[starts[group_id] + index] = _read_sample(table, row, f"group {group_id!r}, sample {index}")
    if len(found) != sum(plan.group_sizes):
        raise ValueError(
            f"the tables must hold all {sum(plan.group_sizes)} samples of step {plan.step}, got {len(found)}"
        )
    return [found[index] for index in range(len(found))]


def sample_indices(microbatch: Microbatch, plan: StepPlan) -> list[int]:
    """Return where a micro-batch's samples stand in the plan's order, in the order of its row's responses."""
    offsets = plan.offsets  # computed anew at each access
    return [offsets[piece.group] + sample for piece in microbatch for sample in piece.samples]


def prompt_groups(microbatch: Microbatch, samples: Sequence[Sample], plan: StepPlan) -> list[PromptGroup]:
    """Return a micro-batch's pieces as prompts with responses."""
    offsets = plan.offsets
    groups = []
    for piece in microbatch:
        members = [samples[offsets[piece.group] + index] for index in piece.samples]
        responses = [member.response_ids for member in members]
        groups.append(PromptGroup(prompt_ids=members[0].prompt_ids, responses=responses))
    return groups


def _read_sample(table: pa.Table, row: int, where: str) -> Sample:
    response_ids = _array(table, "response_ids", row)
    if not response_ids.size:
        raise ValueError(f"a response must have at least one token, got none ({where}); quarantine such a sample")
    sample = Sample(
        prompt_ids=_array(table, "prompt_ids", row),
        response_ids=response_ids,
        logprobs=_tensor(table, "logprobs", row),
        ref_logprobs=_optional(table, "ref_logprobs", row),
        policy_versions=_tensor(table, "policy_versions", row),
        loss_mask=_tensor(table, "loss_mask", row),
        token_scores=_optional(table, "token_scores", row),
        finish_reason=table["finish_reason"][row].as_py(),
    )
    for name in ("logprobs", "ref_logprobs", "policy_versions", "loss_mask", "token_scores"):
        column = getattr(sample, name)
        if column is not None and column.shape[0] != response_ids.size:
            raise ValueError(f"{name} must have {response_ids.size} entries, got {column.shape[0]} ({where})")
    return sample


def _array(table: pa.Table, name: str, row: int) -> np.ndarray:
    return table[name][row].values.to_numpy(zero_copy_only=False)


def _tensor(table: pa.Table, name: str, row: int) -> torch.Tensor:
    return torch.from_numpy(_array(table, name, row).copy())  # Arrow's memory is read-only


def _optional(table: pa.Table, name: str, row: int) -> torch.Tensor | None:
    return _tensor(table, name, row) if table[name][row].is_valid else None
