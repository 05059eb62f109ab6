"""Importance weights and the figures of the mismatch by hand; their expectations are in `test_checks_off_policy.py`."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from learner.off_policy import MISMATCH_NAMES, importance_weights, mismatch
from tests.checks import Case, Check, with_twins

# Ratios old / recorded of two responses; the third token of the second one is not the policy's own.
RATIOS = (1.1, 1.1, 3.0, 0.5, 0.8, 100.0)
LENGTHS = (3, 3)
OWN = (True, True, True, True, True, False)
PRODUCTS = (3.63, 0.4)
MEANS = (3.63 ** (1 / 3), 0.4**0.5)  # 1.537 and .632

Weigh = Callable[..., torch.Tensor]


def are(weigh: Weigh, expected: tuple[float, ...], **settings: Any) -> None:
    """Compare the weights of the policy's own tokens; the others' weigh 0 in the aggregation."""
    behaviour = torch.full((6,), -3.0, dtype=torch.float64)
    old = (behaviour + torch.tensor(RATIOS, dtype=torch.float64).log()).requires_grad_()
    own = torch.tensor(OWN)
    chosen = {"weight": "none", "max_weight": None, "mask": "none", "mask_range": None, **settings}
    weights = weigh(old, behaviour, LENGTHS, own, **chosen)
    assert not weights.requires_grad
    assert weights.isfinite().all()
    torch.testing.assert_close(weights[own], torch.tensor(expected, dtype=torch.float64))


def check(settings: dict[str, Any], expected: tuple[float, ...]) -> Callable[[Weigh], None]:
    return lambda weigh: are(weigh, expected, **settings)


def with_settings(**planted: Any) -> Weigh:
    return lambda *tensors, **settings: importance_weights(*tensors, **(settings | planted))


def every_token(old, behaviour, lengths, loss_mask, **settings):
    return importance_weights(old, behaviour, lengths, torch.ones_like(loss_mask), **settings)


def one_response(old, behaviour, lengths, loss_mask, **settings):
    return importance_weights(old, behaviour, (sum(lengths),), loss_mask, **settings)


def upside_down(old, behaviour, *rest, **settings):
    return importance_weights(behaviour, old.detach(), *rest, **settings)


def with_gradient(old, behaviour, *rest, **settings):
    return importance_weights(old, behaviour, *rest, **settings) * (old - old.detach()).exp()


CHECKS = (
    Check(
        id="none",
        run=check({}, (1.0,) * 5),
        part=importance_weights,
        twins={"token": with_settings(weight="token")},
    ),
    Check(
        id="decoupled",
        run=check({"weight": "token"}, (1.1, 1.1, 3.0, 0.5, 0.8)),
        part=importance_weights,
        twins={
            "truncated": with_settings(max_weight=2.0),
            "upside-down": upside_down,
            "sequence": with_settings(weight="sequence"),
            "not-detached": with_gradient,
        },
    ),
    Check(
        id="token-truncated",
        run=check({"weight": "token", "max_weight": 2.0}, (1.1, 1.1, 2.0, 0.5, 0.8)),
        part=importance_weights,
        twins={"no-limit": with_settings(max_weight=None), "sequence": with_settings(weight="sequence")},
    ),
    Check(
        id="sequence-truncated",
        run=check({"weight": "sequence", "max_weight": 2.0}, (2.0, 2.0, 2.0, 0.4, 0.4)),
        part=importance_weights,
        twins={
            "no-limit": with_settings(max_weight=None),
            "masked-tokens-count": every_token,
            "over-responses": one_response,
        },
    ),
    Check(
        id="sequence",
        run=check({"weight": "sequence"}, (PRODUCTS[0],) * 3 + (PRODUCTS[1],) * 2),
        part=importance_weights,
        twins={"truncated": with_settings(max_weight=2.0), "upside-down": upside_down},
    ),
    Check(  # both bounds are inside
        id="icepop",
        run=check(
            {"weight": "token", "mask": "token", "mask_range": (0.7, 2.0)},
            (1.1, 1.1, 0.0, 0.0, 0.8),
        ),
        part=importance_weights,
        twins={
            "upper-bound-only": with_settings(mask_range=(0.0, 2.0)),
            "lower-bound-only": with_settings(mask_range=(0.7, 9.0)),
            "of-sequences": with_settings(mask="sequence"),
        },
    ),
    Check(  # decided before the truncation: 3 is outside, though its weight would be 2
        id="mask-before-truncation",
        run=check(
            {"weight": "token", "max_weight": 2.0, "mask": "token", "mask_range": (0.4, 2.5)},
            (1.1, 1.1, 0.0, 0.5, 0.8),
        ),
        part=importance_weights,
        twins={
            "not-masked": with_settings(mask="none", mask_range=None),
            "after-the-truncation": lambda *tensors, max_weight, **settings: importance_weights(
                *tensors, **(settings | {"max_weight": None, "mask_range": (0.4, 9.0)})
            ).clamp(max=max_weight),
        },
    ),
    Check(
        id="geometric",
        run=check({"mask": "sequence", "mask_range": (MEANS[1] - 0.01, MEANS[0] - 0.01)}, (0.0, 0.0, 0.0, 1.0, 1.0)),
        part=importance_weights,
        twins={
            "masked-tokens-count": every_token,
            "of-tokens": with_settings(mask="token"),
            "products": with_settings(mask_range=(0.41, 3.6)),
            "over-responses": one_response,
        },
    ),
    Check(
        id="geometric-and-weighted",
        run=check(
            {"weight": "token", "mask": "sequence", "mask_range": (0.7, MEANS[0] + 0.01)}, (1.1, 1.1, 3.0, 0.0, 0.0)
        ),
        part=importance_weights,
        twins={"of-tokens": with_settings(mask="token"), "unweighted": with_settings(weight="none")},
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


@pytest.mark.parametrize("weight", ["token", "sequence"])
def test_a_hopeless_ratio_leaves_the_weight_finite(weight) -> None:
    old, behaviour = torch.tensor([0.0, -300.0]), torch.tensor([-300.0, 0.0])
    settings = {"weight": weight, "max_weight": None, "mask": "none", "mask_range": None}
    assert importance_weights(old, behaviour, (1, 1), torch.ones(2).bool(), **settings).isfinite().all()


Figures = Callable[[torch.Tensor], dict[str, float]]
LN2 = math.log(2)


def figures_by_hand(implementation: Figures) -> None:
    """Ratios 1, 2, 1/2, 4: log-ratios add up to 2 ln 2, ratios to 7.5, their squares to 21.25."""
    found = implementation(torch.tensor([0.0, LN2, -LN2, 2 * LN2], dtype=torch.float64))
    expected = {
        "mismatch_k1": -LN2 / 2,
        "mismatch_k3": (7.5 - 4 - 2 * LN2) / 4,
        "mismatch_p99": 2 * LN2,
        "mismatch_ratio_max": 4.0,
        "mismatch_ess": 7.5**2 / (4 * 21.25),
    }
    assert found == pytest.approx(expected)
    assert tuple(found) == MISMATCH_NAMES


def percentile_by_hand(implementation: Figures) -> None:
    """Of 200 absolute log-ratios .01 .. 2 the largest two are left out, whatever their signs and order."""
    values = torch.arange(1, 201, dtype=torch.float64) / 100
    values[::3] *= -1
    assert implementation(values.flip(0))["mismatch_p99"] == pytest.approx(1.98)


def changing(**changes: Callable[[torch.Tensor], float]) -> Figures:
    return lambda values: mismatch(values) | {f"mismatch_{name}": change(values) for name, change in changes.items()}


FIGURES = (
    Check(
        id="figures",
        run=figures_by_hand,
        part=mismatch,
        twins={
            "other-direction": lambda values: mismatch(-values),
            "biased-ess": changing(ess=lambda v: float(v.exp().mean() ** 2 / v.exp().square().sum())),
            "k1-sign": changing(k1=lambda v: float(v.mean())),
            "largest-log": changing(ratio_max=lambda v: float(v.max())),
        },
    ),
    Check(
        id="p99",
        run=percentile_by_hand,
        part=mismatch,
        twins={
            "with-signs": changing(p99=lambda v: float(v.quantile(0.99))),
            "largest": changing(p99=lambda v: float(v.abs().max())),
            "p95": changing(p99=lambda v: float(v.abs().kthvalue(190).values)),
        },
    ),
)


@with_twins(FIGURES)
def test_mismatch(case: Case) -> None:
    case.verify()


def test_no_tokens_are_no_mismatch() -> None:
    assert mismatch(torch.zeros(0)) == dict.fromkeys(MISMATCH_NAMES, 0.0) | {"mismatch_ess": 1.0}


def test_equal_policies_are_no_mismatch() -> None:
    assert mismatch(torch.zeros(7)) == dict.fromkeys(MISMATCH_NAMES, 0.0) | {
        "mismatch_ess": 1.0,
        "mismatch_ratio_max": 1.0,
    }
