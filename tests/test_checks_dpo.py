"""C14: DPO is Bradley-Terry's likelihood of the reward beta log(p / p_ref); C1 of its loss."""

from collections.abc import Callable

import torch

from learner.dpo import dpo_loss
from tests.checks import Case, Check, with_twins
from tests.loss_toys import (
    GRID,
    TARGETS,
    gradient,
    slope_is_gradient,
)

REFERENCE = torch.tensor([0.4, 0.1, -0.3, 0.9], dtype=torch.float64)
POLICY = torch.tensor([-0.2, 0.6, 0.5, 0.1], dtype=torch.float64)
CHOSEN, REJECTED = torch.tensor([0, 3, 1, 2]), torch.tensor([1, 2, 2, 0])
BETA = 0.3


def dpo_of_logits(loss: Callable[..., torch.Tensor], policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    p, q = policy.log_softmax(0), reference.log_softmax(0)
    return loss(p[CHOSEN], p[REJECTED], q[CHOSEN], q[REJECTED], beta=BETA)


def dpo_is_bradley_terry(loss: Callable[..., torch.Tensor]) -> None:
    reward = BETA * (POLICY.log_softmax(0) - REFERENCE.log_softmax(0))
    wrong = torch.sigmoid(reward[REJECTED] - reward[CHOSEN])  # what Bradley-Terry gives to the other outcome
    value = dpo_of_logits(loss, POLICY, REFERENCE)
    torch.testing.assert_close(value, -(1 - wrong).log(), rtol=1e-12, atol=0)
    scores = torch.eye(4, dtype=torch.float64) - POLICY.softmax(0)  # row y: gradient of log p(y)
    expected = -(BETA * wrong)[:, None] * (scores[CHOSEN] - scores[REJECTED])
    actual = gradient(lambda logits: dpo_of_logits(loss, logits, REFERENCE).sum(), POLICY)
    torch.testing.assert_close(actual, expected.sum(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dpo_of_logits(loss, POLICY + 7.0, REFERENCE - 3.0), value, rtol=1e-12, atol=0)
    at_reference = dpo_of_logits(loss, REFERENCE, REFERENCE)
    torch.testing.assert_close(at_reference, torch.full_like(at_reference, 2.0).log())


def dpo_has_its_slope(loss: Callable[..., torch.Tensor]) -> None:
    for label_smoothing in (0.0, 0.1):

        def objective(points: torch.Tensor, smoothing: float = label_smoothing) -> torch.Tensor:
            chosen, rejected = points[:3], points[3:]
            return loss(chosen, rejected, TARGETS[:3], TARGETS[3:], beta=0.7, label_smoothing=smoothing).sum()

        slope_is_gradient(objective, GRID)


CHECKS = (
    Check(
        id="C1-dpo",
        run=dpo_has_its_slope,
        part=dpo_loss,
        twins={"rejected-detached": lambda c, r, *rest, **s: dpo_loss(c, r.detach(), *rest, **s)},
    ),
    Check(
        id="C14-dpo",
        run=dpo_is_bradley_terry,
        part=dpo_loss,
        twins={
            "reference-forgotten": lambda c, r, qc, qr, **s: dpo_loss(c, r, 0 * qc, 0 * qr, **s),
            "reference-sign": lambda c, r, qc, qr, **s: dpo_loss(c, r, qr, qc, **s),
            "beta-forgotten": lambda *pair, beta: dpo_loss(*pair, beta=1.0),
            "sides-swapped": lambda c, r, qc, qr, **s: dpo_loss(r, c, qr, qc, **s),
        },
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()
