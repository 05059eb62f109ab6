"""KL estimators against exact sums over a small vocabulary, and the adaptive controller against its golden sequence."""

import json
from collections.abc import Callable

import pytest
import torch

from learner.algorithm_config import KLConfig
from learner.kl import AdaptiveKL, FixedKL, k1, k2, k3, make_kl_controller

LOGITS = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
OTHER = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()


def expectation(estimator: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
    logprobs = LOGITS.log_softmax(0)
    return (logprobs.exp() * estimator(logprobs, OTHER)).sum().item()


def gradient_as_a_loss(estimator: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The expected gradient of the estimator as a loss: samples fixed, only the estimator differentiated."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    (logprobs.exp().detach() * estimator(logprobs, OTHER)).sum().backward()
    return logits.grad


def check_expectations(one, two, three) -> None:
    assert expectation(one) == pytest.approx(0.0498965, abs=1e-7)
    assert expectation(two) == pytest.approx(0.0504194, abs=1e-7)
    assert expectation(three) == pytest.approx(0.0498965, abs=1e-7)
    logprobs = torch.linspace(-3, 0, 7, dtype=torch.float64)
    assert (three(logprobs, logprobs.flip(0)) >= 0).all()


def flipped(estimator):
    return lambda logprobs, other: estimator(other, logprobs)


def test_expectations_are_the_exact_kl() -> None:
    check_expectations(k1, k2, k3)


@pytest.mark.parametrize(
    "estimators", [(flipped(k1), k2, k3), (k1, lambda a, b: (a - b).square(), k3), (k1, k2, flipped(k3))]
)
def test_a_flipped_sign_or_a_missing_half_is_caught(estimators) -> None:
    with pytest.raises(AssertionError):
        check_expectations(*estimators)


def test_as_losses_only_k2_has_the_gradient_of_the_kl() -> None:
    true = torch.tensor([-0.140136, 0.004289, 0.135848], dtype=torch.float64)
    of_the_reverse = torch.tensor([-0.146385, 0.014478, 0.131906], dtype=torch.float64)
    torch.testing.assert_close(gradient_as_a_loss(k1), torch.zeros_like(true), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient_as_a_loss(k2), true, atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient_as_a_loss(k3), of_the_reverse, atol=1e-6, rtol=0)


def test_k3_keeps_its_digits_near_zero() -> None:
    assert k3(torch.tensor([1e-4]), torch.tensor([0.0])).item() == pytest.approx(5e-9, rel=0.2)


class _WrongSign(AdaptiveKL):
    def update(self, mean_kl: float, num_sequences: int) -> None:
        super().update(2 * self._target - mean_kl, num_sequences)


class _NotClipped(AdaptiveKL):
    def update(self, mean_kl: float, num_sequences: int) -> None:
        self._coef *= 1 + (mean_kl / self._target - 1) * num_sequences / self._horizon


def check_golden_sequence(controller_type: type[AdaptiveKL]) -> None:
    controller = controller_type(0.15, target=6.0, horizon=10_000)
    golden = [(0.0, 0.14846400), (3.0, 0.14694373), (6.0, 0.14694373), (12.0, 0.14844843), (12.0, 0.14996854)]
    for measured, expected in golden:
        controller.update(measured, 512)
        assert controller.coef == pytest.approx(expected, abs=5e-9)


def test_the_adaptive_controller_follows_the_golden_sequence() -> None:
    check_golden_sequence(AdaptiveKL)


@pytest.mark.parametrize("twin", [_WrongSign, _NotClipped])
def test_a_wrong_controller_is_caught(twin: type[AdaptiveKL]) -> None:
    with pytest.raises(AssertionError):
        check_golden_sequence(twin)


def test_the_adaptive_controller_settles_on_a_bandit_at_its_target() -> None:
    """The optimum of a KL-regularised bandit for each coefficient: the controller must find the one of KL 0.3."""
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    controller = AdaptiveKL(0.2, target=0.3, horizon=1000)

    def measure() -> float:
        policy = (reference.log() + torch.tensor([0.0, 1.0, 2.0]) / controller.coef).softmax(0)
        return (policy * (policy / reference).log()).sum().item()

    for _ in range(200):
        controller.update(measure(), 256)
    assert measure() == pytest.approx(0.3, rel=0.2)


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
