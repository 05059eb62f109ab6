"""Where a micro-batch's samples stand in the plan's order."""

import numpy as np
import pytest
import torch

from learner.batch import Piece, StepPlan
from learner.samples import Sample, prompt_groups, sample_indices

PLAN = StepPlan(
    step=1,
    group_ids=("1/a", "1/b", "1/c"),
    group_sizes=(2, 3, 2),
    scores=np.zeros(7),
    kl_coef=0.0,
    baseline=0.0,
    updates=(),
    value_ranks=(),
)
MICROBATCH = (Piece(group=2, samples=(0, 1)), Piece(group=1, samples=(0, 2)))


def sample(index: int) -> Sample:
    return Sample(
        prompt_ids=np.array([90]),
        response_ids=np.array([index]),
        logprobs=torch.zeros(1),
        ref_logprobs=None,
        policy_versions=torch.zeros(1, dtype=torch.int32),
        loss_mask=torch.ones(1, dtype=torch.bool),
        token_scores=None,
        finish_reason="eos",
    )


def test_samples_are_found_with_one_look_at_the_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan computes its offsets at each access, so one access per sample would be quadratic."""
    offsets, looks = PLAN.offsets, []
    monkeypatch.setattr(StepPlan, "offsets", property(lambda plan: looks.append(1) or offsets))
    assert sample_indices(MICROBATCH, PLAN) == [5, 6, 2, 4]
    assert len(looks) == 1
    groups = prompt_groups(MICROBATCH, [sample(index) for index in range(7)], PLAN)
    assert [[int(ids[0]) for ids in group.responses] for group in groups] == [[5, 6], [2, 4]]
    assert len(looks) == 2


def test_no_samples_in_an_empty_microbatch() -> None:
    assert sample_indices((), PLAN) == []
    assert prompt_groups((), [], PLAN) == []
