"""The KL controllers' limits and state, and digits near zero; expectations, gradients and the golden sequence are in
`test_checks_vectors.py`, settling on a target in `test_checks_bandit.py`.
"""

import json

import pytest
import torch

from learner.algorithm_config import KLConfig
from learner.kl import AdaptiveKL, FixedKL, k1, k2, k3, make_kl_controller
from tests.checks import Case, Check, with_twins


def digits_are_kept(estimator) -> None:
    """1e-4 away k3 is 1e-8 / 2 to seven digits in float32, where exp(x) - 1 would leave one."""
    assert estimator(torch.tensor([1e-4]), torch.zeros(1)).item() == pytest.approx(4.99983e-9, rel=1e-2)


def is_never_negative(estimator) -> None:
    logprobs = torch.linspace(-3, 0, 7, dtype=torch.float64)
    assert (estimator(logprobs, logprobs.flip(0)) >= 0).all()
    assert estimator(logprobs, logprobs).eq(0).all()


def does_not_jump(controller_type: type[AdaptiveKL]) -> None:
    """A KL that is 20% off moves the weight as one that is 20 times off does: by .2 * 50 / 1000."""
    for measured, factor in ((7.2, 1.01), (120.0, 1.01), (4.8, 0.99), (-3.0, 0.99), (6.6, 1.005)):
        controller = controller_type(0.1, target=6.0, horizon=1000)
        controller.update(measured, 50)
        assert controller.coef == pytest.approx(0.1 * factor)


class NotClipped(AdaptiveKL):
    def update(self, mean_kl: float, num_sequences: int) -> None:
        self._coef *= 1 + (mean_kl / self._target - 1) * num_sequences / self._horizon


class PerStep(AdaptiveKL):
    def update(self, mean_kl: float, num_sequences: int) -> None:
        super().update(mean_kl, 1)


CHECKS = (
    Check(
        id="k3-near-zero",
        run=digits_are_kept,
        part=k3,
        twins={"exp-minus-one": lambda p, q: (q - p).exp() - 1 - (q - p), "k1": k1},
    ),
    Check(id="k2-not-negative", run=is_never_negative, part=k2, twins={"k1": k1}),
    Check(
        id="k3-not-negative",
        run=is_never_negative,
        part=k3,
        twins={"k1": k1, "other-ratio": lambda p, q: (q - p).expm1() - (p - q)},
    ),
    Check(id="adaptive-clip", run=does_not_jump, part=AdaptiveKL, twins={"none": NotClipped, "per-step": PerStep}),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


def test_the_fixed_controller_stays_and_both_refuse_a_nan() -> None:
    controller = make_kl_controller(KLConfig(coef=0.05))
    assert isinstance(controller, FixedKL)
    controller.update(100.0, 512)
    assert controller.coef == 0.05
    for one in (controller, AdaptiveKL(0.1, target=6.0, horizon=100)):
        with pytest.raises(ValueError, match="measured KL must be finite, got nan"):
            one.update(float("nan"), 4)


def test_the_adaptive_weight_stays_positive() -> None:
    with pytest.raises(ValueError, match=r"coef must be greater than 0 with controller adaptive, got 0.0"):
        KLConfig(coef=0.0, controller="adaptive", target=6.0, horizon=1000)
    assert KLConfig(coef=0.0).coef == 0.0
    controller = AdaptiveKL(0.1, target=6.0, horizon=100)
    controller.update(0.0, 499)
    assert 0.0 < controller.coef < 0.1
    before = controller.coef
    for num_sequences in (500, 512):
        with pytest.raises(ValueError, match=rf"horizon must be more than 0.2 times .*, got 100 with {num_sequences}"):
            controller.update(0.0, num_sequences)
    assert controller.coef == before


def test_state_goes_through_json_exactly() -> None:
    config = KLConfig(coef=0.15, controller="adaptive", target=6.0, horizon=777)
    one, other = make_kl_controller(config), make_kl_controller(config)
    one.update(7.3, 123)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.coef == one.coef != 0.15
    with pytest.raises(ValueError, match="must be empty"):
        FixedKL(0.1).load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="must hold `coef`"):
        other.load_state_dict({})
