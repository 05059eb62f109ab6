"""PPO's losses: published vectors, equalities, gradients, and aggregation that does not depend on the split."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch

from learner.algorithm_config import AlgorithmConfig
from learner.losses import (
    SHARE_NAMES,
    PolicyLoss,
    PPOLoss,
    Predictions,
    Targets,
    aggregation_weights,
    ppo_clip,
    ppo_loss,
    value_loss,
)

MODES = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum")
PPOClip = Callable[..., PolicyLoss]


def check_published_ppo_clip(implementation: PPOClip) -> None:
    # rlax `policy_gradients_test.py`, ClippedSurrogatePGLossTest.
    logits = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [-1.0, -2.0, -3.0]])
    old_logits = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [-3.0, -2.0, -1.0]])
    actions, advantages = torch.tensor([[0], [1], [2]]), torch.tensor([0.3, 0.2, 0.1])
    logprobs = logits.log_softmax(-1).gather(1, actions).squeeze(1)
    old_logprobs = old_logits.log_softmax(-1).gather(1, actions).squeeze(1)
    for sign, expected in ((1, -0.17117467), (-1, 0.19333333)):
        loss = implementation(logprobs, old_logprobs, sign * advantages, clip_range=0.2).loss
        assert loss.mean().item() == pytest.approx(expected, abs=1e-5)


def check_published_dual_clip(implementation: PPOClip) -> None:
    # slime `tests/test_policy_loss.py`: ratios 2, 2, 0.5.
    logprobs, advantages = torch.tensor([2.0, 2.0, 0.5]).log(), torch.tensor([2.0, -2.0, 2.0])
    loss = implementation(logprobs, torch.zeros(3), advantages, clip_range=0.2, dual_clip=1.5)
    torch.testing.assert_close(loss.loss, torch.tensor([-2.4, 3.0, -1.0]))
    assert loss.is_clipped.tolist() == [True, True, False]


def clip_on_the_wrong_side(logprobs, old_logprobs, advantages, **settings):
    result = ppo_clip(logprobs, old_logprobs, advantages, **settings)
    low = settings["clip_range"]
    ratio = (logprobs - old_logprobs).exp()
    loss = torch.minimum(-ratio * advantages, -ratio.clamp(1 - low, 1 + low) * advantages)
    return PolicyLoss(loss=loss, ratio=result.ratio, is_clipped=result.is_clipped, approx_kl=result.approx_kl)


def ratio_upside_down(logprobs, old_logprobs, advantages, **settings):
    return ppo_clip(old_logprobs, logprobs, advantages, **settings)


def dual_clip_for_all_advantages(logprobs, old_logprobs, advantages, *, dual_clip, **settings):
    result = ppo_clip(logprobs, old_logprobs, advantages, **settings)
    loss = torch.minimum(result.loss, -dual_clip * advantages)
    return PolicyLoss(loss=loss, ratio=result.ratio, is_clipped=result.is_clipped, approx_kl=result.approx_kl)


def test_ppo_clip_equals_the_published_vector() -> None:
    check_published_ppo_clip(ppo_clip)


def test_dual_clip_equals_the_published_vector() -> None:
    check_published_dual_clip(ppo_clip)


@pytest.mark.parametrize("twin", [clip_on_the_wrong_side, ratio_upside_down])
def test_a_wrong_clip_is_caught(twin: PPOClip) -> None:
    with pytest.raises(AssertionError):
        check_published_ppo_clip(twin)


@pytest.mark.parametrize("twin", [dual_clip_for_all_advantages, lambda *a, dual_clip, **s: ppo_clip(*a, **s)])
def test_a_wrong_dual_clip_is_caught(twin: PPOClip) -> None:
    with pytest.raises(AssertionError):
        check_published_dual_clip(twin)


def check_gradients_of_the_branches(implementation: PPOClip) -> None:
    """By hand for eps 0.2: the gradient of -r A is -r A where the loss is not clipped, and exactly 0 where it is."""
    ratios, advantages = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5, 1.1]), torch.tensor([2.0, 2.0, -2.0, 2.0, -2.0, -2.0])
    logprobs = ratios.log().requires_grad_()
    result = implementation(logprobs, torch.zeros(6), advantages, clip_range=0.2)
    result.loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-2.0, 0.0, 3.0, -1.0, 0.0, 2.2]))
    assert (logprobs.grad == 0).tolist() == result.is_clipped.tolist() == [False, True, False, False, True, False]
    torch.testing.assert_close(result.approx_kl, ratios - 1 - ratios.log())


def detached_ratio(logprobs, old_logprobs, advantages, **settings):
    result = ppo_clip(logprobs.detach(), old_logprobs, advantages, **settings)
    loss = result.loss.detach() * (1 + logprobs - logprobs.detach())
    return PolicyLoss(loss=loss, ratio=result.ratio, is_clipped=result.is_clipped, approx_kl=result.approx_kl)


def test_the_gradient_is_exactly_zero_where_a_clip_is_active() -> None:
    check_gradients_of_the_branches(ppo_clip)


@pytest.mark.parametrize("twin", [detached_ratio, clip_on_the_wrong_side])
def test_a_gradient_through_the_clipped_branch_is_caught(twin: PPOClip) -> None:
    with pytest.raises(AssertionError):
        check_gradients_of_the_branches(twin)


def test_at_ratio_one_nothing_is_clipped_and_the_gradient_is_reinforce() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(5, generator=generator, dtype=torch.float64)
    logprobs = logits.log_softmax(-1)[:, 1]
    result = ppo_clip(logprobs, logprobs.detach(), advantages, clip_range=0.2, dual_clip=3.0)
    assert not result.is_clipped.any()
    assert torch.equal(result.loss, -advantages)
    assert torch.equal(result.approx_kl, torch.zeros(5).double())
    of_ppo = torch.autograd.grad(result.loss.sum(), logits, retain_graph=True)[0]
    of_reinforce = torch.autograd.grad(-(logprobs * advantages).sum(), logits)[0]
    torch.testing.assert_close(of_ppo, of_reinforce)


def test_clip_higher_moves_only_the_upper_clip() -> None:
    logprobs = torch.tensor([1.25, 1.4, 0.7]).log()
    loss = ppo_clip(logprobs, torch.zeros(3), torch.tensor([1.0, 1.0, -1.0]), clip_range=0.2, clip_range_high=0.28)
    torch.testing.assert_close(loss.loss, torch.tensor([-1.25, -1.28, 0.8]))
    assert loss.is_clipped.tolist() == [False, True, True]


def test_a_hopeless_ratio_leaves_the_gradient_finite() -> None:
    logprobs = torch.tensor([0.0, -300.0], requires_grad=True)
    ppo_clip(logprobs, torch.tensor([-300.0, 0.0]), torch.tensor([1.0, -1.0]), clip_range=0.2).loss.sum().backward()
    assert logprobs.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: ppo_clip(x, x.new_zeros(6), x.new_tensor([1, -1, 2, -2, 1, -1]), clip_range=0.2, dual_clip=3.0).loss,
        lambda x: value_loss(x, x.new_zeros(6), x.new_tensor([1, -1, 2, -2, 1, -1]), clip_range=0.3),
        lambda x: value_loss(x, x.new_zeros(6), x.new_tensor([1, -1, 2, -2, 1, -1]), clip_range=None),
    ],
    ids=["policy", "value clipped", "value"],
)
def test_autograd_equals_finite_differences(loss) -> None:
    # Away from the kinks at log(0.8) = -.223, log(1.2) = .182, +-0.3.
    points = torch.tensor([0.05, -0.1, 0.4, 1.5, -0.4, -0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, points, eps=1e-6, rtol=1e-6, atol=1e-8)


ValueLoss = Callable[..., torch.Tensor]


def check_value_loss(implementation: ValueLoss) -> None:
    """Worked by hand: old value 1, clip 0.2; the larger error counts, so a clip never hides how wrong a value is."""
    values, returns = torch.tensor([1.1, 2.0, 2.0, 0.0]), torch.tensor([2.0, 2.0, 0.0, 1.5])
    actual = implementation(values, torch.ones(4), returns, clip_range=0.2)
    # errors of v:      -0.9   0     2    -1.5     of the clipped v (1.1, 1.2, 1.2, 0.8): -0.9  -0.8  1.2  -0.7
    torch.testing.assert_close(actual, torch.tensor([0.405, 0.32, 2.0, 1.125]))


def value_loss_with_min(values, old_values, returns, *, clip_range):
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.minimum((values - returns) ** 2, (near - returns) ** 2)


def test_value_loss_is_half_the_larger_error() -> None:
    check_value_loss(value_loss)
    unclipped = value_loss(torch.tensor([3.0]), torch.zeros(1), torch.tensor([1.0]), clip_range=None)
    assert unclipped.item() == 2.0


@pytest.mark.parametrize(
    "twin",
    [
        value_loss_with_min,
        lambda *a, clip_range: 2 * value_loss(*a, clip_range=clip_range),
        lambda *a, clip_range: value_loss(*a, clip_range=None),
    ],
    ids=["min", "no half", "no clip"],
)
def test_a_wrong_value_loss_is_caught(twin: ValueLoss) -> None:
    with pytest.raises(AssertionError):
        check_value_loss(twin)


Weights = Callable[..., torch.Tensor]


def check_weights(implementation: Weights) -> None:
    """Two sequences, the second with a token that is not the policy's: 1 + 2 loss tokens in 2 sequences."""
    mask = torch.tensor([True, True, False, True])
    expected = {
        "token_mean": [1 / 3, 1 / 3, 0, 1 / 3],
        "sequence_mean_token_mean": [1 / 2, 1 / 4, 0, 1 / 4],
        "sequence_mean_token_sum": [1 / 2, 1 / 2, 0, 1 / 2],
    }
    for mode, weights in expected.items():
        actual = implementation((1, 3), mask, mode, total_tokens=3, total_sequences=2)
        torch.testing.assert_close(actual, torch.tensor(weights))


def weights_by_all_tokens(lengths, loss_mask, mode, *, total_tokens, total_sequences):
    ones = torch.ones_like(loss_mask)
    return loss_mask * aggregation_weights(
        lengths, ones, mode, total_tokens=total_tokens, total_sequences=total_sequences
    )


def test_weights_by_hand() -> None:
    check_weights(aggregation_weights)
    empty = torch.zeros(0, dtype=torch.bool)
    for mode in MODES:
        assert aggregation_weights((), empty, mode, total_tokens=3, total_sequences=2).shape == (0,)
    with pytest.raises(ValueError, match="must add up to 4 tokens, got 3"):
        aggregation_weights((3,), torch.ones(4, dtype=torch.bool), MODES[0], total_tokens=4, total_sequences=1)


def test_weights_that_count_masked_tokens_are_caught() -> None:
    with pytest.raises(AssertionError):
        check_weights(weights_by_all_tokens)


LENGTHS = (3, 1, 5, 2)
ALGORITHM = AlgorithmConfig(entropy_coef=0.01, value_coef=0.5, dual_clip=3.0)


def _minibatch() -> tuple[torch.Tensor, Targets]:
    """Parameters [3, S] = logprobs, values, entropy of 4 sequences, and their targets."""
    generator = torch.Generator().manual_seed(5)
    num_tokens = sum(LENGTHS)
    parameters = torch.randn(3, num_tokens, generator=generator, dtype=torch.float64) * 0.3
    rows = torch.randn(4, num_tokens, generator=generator, dtype=torch.float64)
    mask = torch.ones(num_tokens, dtype=torch.bool)
    mask[[1, 6]] = False
    targets = Targets(
        old_logprobs=0.2 * rows[0], old_values=rows[1], advantages=rows[2], returns=rows[3], loss_mask=mask
    )
    return parameters, targets


def _loss_of(
    sequences: Sequence[int], parameters: torch.Tensor, targets: Targets, mode: str, weigh: Weights
) -> PPOLoss:
    starts = [0, *itertools.accumulate(LENGTHS)]
    tokens = torch.tensor([t for b in sequences for t in range(starts[b], starts[b + 1])], dtype=torch.long)
    logprobs, values, entropy = parameters[:, tokens]
    part = Targets(**{name: getattr(targets, name)[tokens] for name in Targets.__slots__})
    lengths = [LENGTHS[b] for b in sequences]
    total_tokens = int(targets.loss_mask.sum())
    weights = weigh(lengths, part.loss_mask, mode, total_tokens=total_tokens, total_sequences=len(LENGTHS))
    predictions = Predictions(logprobs=logprobs, values=values, entropy=entropy)
    return ppo_loss(predictions, part, weights, algorithm=ALGORITHM, total_tokens=total_tokens)


SPLITS = [[(0, 1, 2, 3)], [(0, 1), (2, 3)], [(3, 0), (), (2,), (1,)], [(0,), (1,), (2,), (3,), ()]]


def check_split_invariance(weigh: Weights) -> None:
    """Loss, gradient and diagnostics are those of the whole minibatch, however it is cut and in whatever order."""
    for mode in MODES:
        results = []
        for split in SPLITS:
            parameters, targets = _minibatch()
            parameters.requires_grad_()
            losses = [_loss_of(sequences, parameters, targets, mode, weigh) for sequences in split]
            for loss in losses:
                loss.total.backward()
            ratio_max = torch.stack([loss.ratio_max for loss in losses]).max()
            results.append((sum(loss.shares for loss in losses), parameters.grad, ratio_max))
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-14)


def weights_of_the_microbatch(lengths, loss_mask, mode, **_):
    total_tokens = max(1, int(loss_mask.sum()))
    return aggregation_weights(
        lengths, loss_mask, mode, total_tokens=total_tokens, total_sequences=max(1, len(lengths))
    )


def test_k_microbatches_equal_one_batch() -> None:
    check_split_invariance(aggregation_weights)


def test_denominators_of_the_microbatch_are_caught() -> None:
    with pytest.raises(AssertionError):
        check_split_invariance(weights_of_the_microbatch)


def test_the_total_is_policy_plus_value_less_entropy() -> None:
    parameters, targets = _minibatch()
    loss = _loss_of((0, 1, 2, 3), parameters, targets, "token_mean", aggregation_weights)
    shares = dict(zip(SHARE_NAMES, loss.shares.tolist(), strict=True))
    expected = shares["policy_loss"] + 0.5 * shares["value_loss"] - 0.01 * shares["entropy"]
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)
    entropy = parameters[2][targets.loss_mask].mean().item()
    assert shares["entropy"] == pytest.approx(entropy)
    ratios = (parameters[0] - targets.old_logprobs)[targets.loss_mask].exp()
    assert loss.ratio_max.item() == pytest.approx(ratios.max().item())
    assert shares["approx_kl"] == pytest.approx((ratios - 1 - ratios.log()).mean().item())
