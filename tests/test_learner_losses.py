"""Policy and value losses by hand; published vectors, slopes and splits are in `test_checks_*.py`."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from learner.losses import LossInputs, PolicyLoss, aggregation_weights, cispo, policy_gradient, ppo_clip, value_loss
from tests.checks import Case, Check, with_twins
from tests.loss_toys import MODES

Loss = Callable[..., PolicyLoss]

LENGTHS = (2, 1)
RATIOS = (2.0, 0.5, 1.5)  # of the first sequence the product is 1
ADVANTAGES = (1.0, 1.0, -2.0)


def inputs(
    ratios: tuple[float, ...] = RATIOS,
    advantages: tuple[float, ...] = ADVANTAGES,
    lengths: tuple[int, ...] = LENGTHS,
    mask: tuple[bool, ...] | None = None,
) -> LossInputs:
    """Return tokens of probability 0.2 under the current policy."""
    logprobs = torch.full((len(ratios),), 0.2, dtype=torch.float64).log()
    return LossInputs(
        logprobs=logprobs.requires_grad_(),
        old_logprobs=logprobs.detach() - torch.tensor(ratios, dtype=torch.float64).log(),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        lengths=lengths,
        loss_mask=torch.tensor(mask or (True,) * len(ratios), dtype=torch.bool),
    )


def is_by_hand(loss: PolicyLoss, logprobs: torch.Tensor, *, values: list[float], slopes: list[float]) -> None:
    """Compare each token's loss and the gradient of their sum."""
    torch.testing.assert_close(loss.loss, torch.tensor(values, dtype=torch.float64), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss.loss.sum(), logprobs)
    torch.testing.assert_close(gradient, torch.tensor(slopes, dtype=torch.float64))
    assert not loss.ratio.requires_grad


def policy_gradient_by_hand(implementation: Loss) -> None:
    """-A log 0.2 = 1.6094 A, and the gradient is -A whatever the ratio."""
    given = inputs()
    result = implementation(given)
    is_by_hand(result, given.logprobs, values=[1.609438, 1.609438, -3.218876], slopes=[-1.0, -1.0, 2.0])
    torch.testing.assert_close(result.ratio, torch.tensor(RATIOS, dtype=torch.float64))
    assert not result.is_clipped.any()


def clip_higher_by_hand(implementation: Loss) -> None:
    """Clips at 0.8 and 1.28: only the upper one has moved."""
    given = inputs((1.25, 1.4, 0.7, 0.7), (1.0, 1.0, -1.0, 1.0), (4,))
    result = implementation(given, clip_range=0.2, clip_range_high=0.28)
    is_by_hand(result, given.logprobs, values=[-1.25, -1.28, 0.8, -0.7], slopes=[-1.25, 0.0, 0.0, -0.7])
    assert result.is_clipped.tolist() == [False, True, True, False]


def cispo_by_hand(implementation: Loss) -> None:
    """Weights clipped to [0.6, 1.2]: 1.2, 0.6, 1.2; times -A log 0.2, and every token keeps a gradient."""
    given = inputs()
    result = implementation(given, clip_range=0.4, clip_range_high=0.2)
    is_by_hand(result, given.logprobs, values=[1.931325, 0.965663, -3.862651], slopes=[-1.2, -0.6, 2.4])
    assert result.is_clipped.tolist() == [True, True, True]
    inside = inputs((1.1, 0.7, 1.0))
    assert not implementation(inside, clip_range=0.4, clip_range_high=0.2).is_clipped.any()


def sequence_ratio_by_hand(implementation: Loss) -> None:
    """s = 2 * 0.5 = 1 and 1.5: the sequences' losses are -1 and 3, and d(s A)/d log pi = s A at each token."""
    given = inputs()
    result = implementation(given, clip_range=0.2, ratio="sequence")
    is_by_hand(result, given.logprobs, values=[-0.5, -0.5, 3.0], slopes=[-1.0, -1.0, 3.0])
    assert not result.is_clipped.any()
    clipped = inputs((2.0, 1.0, 0.5))  # s = 2, beyond the clip with A > 0; s = .5, beyond it with A < 0
    result = implementation(clipped, clip_range=0.2, ratio="sequence")
    is_by_hand(result, clipped.logprobs, values=[-0.6, -0.6, 1.6], slopes=[0.0, 0.0, 0.0])
    assert result.is_clipped.all()


def sequence_mean_by_hand(implementation: Loss) -> None:
    """s = sqrt(1.44 * 1) = 1.2 and 1.5; averaged over the sequence, value and gradient are those of s A."""
    given = inputs((1.44, 1.0, 1.5))
    result = implementation(given, clip_range=0.3, ratio="sequence_mean")
    is_by_hand(result, given.logprobs, values=[-1.2, -1.2, 3.0], slopes=[-1.2, -1.2, 3.0])
    torch.testing.assert_close(result.ratio, torch.tensor([1.2, 1.2, 1.5], dtype=torch.float64))
    masked = inputs((1.21, 50.0, 1.5), mask=(True, False, True))  # s is of the policy's own token alone
    result = implementation(masked, clip_range=0.3, ratio="sequence_mean")
    torch.testing.assert_close(result.ratio[[0, 2]], torch.tensor([1.21, 1.5], dtype=torch.float64))


def of_all_tokens(implementation: Loss) -> Loss:
    return lambda given, **settings: implementation(
        replace(given, loss_mask=torch.ones_like(given.loss_mask)), **settings
    )


def with_ratio(ratio: str) -> Loss:
    return lambda given, **settings: ppo_clip(given, **(settings | {"ratio": ratio}))


def value_loss_by_hand(implementation: Callable[..., torch.Tensor]) -> None:
    """Old value 1, clip 0.2; the larger error counts, so a clip never hides how wrong a value is."""
    values, returns = torch.tensor([1.1, 2.0, 2.0, 0.0]), torch.tensor([2.0, 2.0, 0.0, 1.5])
    actual = implementation(values, torch.ones(4), returns, clip_range=0.2)
    # errors of v:      -0.9   0     2    -1.5     of the clipped v (1.1, 1.2, 1.2, 0.8): -0.9  -0.8  1.2  -0.7
    torch.testing.assert_close(actual, torch.tensor([0.405, 0.32, 2.0, 1.125]))
    assert implementation(torch.tensor([3.0]), torch.zeros(1), torch.tensor([1.0]), clip_range=None).item() == 2.0


def value_loss_with_min(values, old_values, returns, *, clip_range):
    clip_range = clip_range or 1e9
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.minimum((values - returns) ** 2, (near - returns) ** 2)


EXPECTED_WEIGHTS = {
    "token_mean": [1 / 3, 1 / 3, 0, 1 / 3],
    "sequence_mean_token_mean": [1 / 2, 1 / 4, 0, 1 / 4],
    "sequence_mean_token_sum": [1 / 2, 1 / 2, 0, 1 / 2],
    "sequence_mean_token_sum_norm": [1 / 20, 1 / 20, 0, 1 / 20],
}


def weights_by_hand(implementation: Callable[..., torch.Tensor]) -> None:
    """Two sequences, the second with a token that is not the policy's: 1 + 2 loss tokens; longest possible 10."""
    mask = torch.tensor([True, True, False, True])
    assert set(EXPECTED_WEIGHTS) == set(MODES)
    for mode, expected in EXPECTED_WEIGHTS.items():
        actual = implementation((1, 3), mask, mode, total_tokens=3, total_sequences=2, norm_tokens=10)
        torch.testing.assert_close(actual, torch.tensor(expected))


def with_totals(change: Callable[..., dict[str, int]]) -> Callable[..., torch.Tensor]:
    return lambda lengths, mask, mode, **totals: aggregation_weights(
        lengths, mask, mode, **(totals | change(lengths=lengths, mask=mask))
    )


CHECKS = (
    Check(
        id="policy-gradient",
        run=policy_gradient_by_hand,
        part=policy_gradient,
        twins={
            "with-the-ratio": lambda given: cispo(given, clip_range=1e9),
            "clipped-surrogate": lambda given: ppo_clip(given, clip_range=0.2),
        },
    ),
    Check(
        id="clip-higher",
        run=clip_higher_by_hand,
        part=ppo_clip,
        twins={
            "lower-clip-moved-too": lambda given, *, clip_range, clip_range_high: ppo_clip(
                given, clip_range=clip_range_high
            ),
            "upper-clip-not-moved": lambda given, *, clip_range, clip_range_high: ppo_clip(
                given, clip_range=clip_range
            ),
        },
    ),
    Check(
        id="cispo",
        run=cispo_by_hand,
        part=cispo,
        twins={
            "clips-swapped": lambda given, *, clip_range, clip_range_high: cispo(
                given, clip_range=clip_range_high, clip_range_high=clip_range
            ),
            "ppo": lambda given, **settings: ppo_clip(given, **settings),
            "not-clipped": lambda given, **_: cispo(given, clip_range=1e9),
        },
    ),
    Check(
        id="sequence-ratio",
        run=sequence_ratio_by_hand,
        part=ppo_clip,
        twins={"of-tokens": with_ratio("token"), "geometric-mean": with_ratio("sequence_mean")},
    ),
    Check(
        id="gspo",
        run=sequence_mean_by_hand,
        part=ppo_clip,
        twins={
            "of-tokens": with_ratio("token"),
            "product": with_ratio("sequence"),
            "masked-tokens-count": of_all_tokens(ppo_clip),
        },
    ),
    Check(
        id="value-loss",
        run=value_loss_by_hand,
        part=value_loss,
        twins={
            "smaller-error": value_loss_with_min,
            "no-half": lambda *a, clip_range: 2 * value_loss(*a, clip_range=clip_range),
            "no-clip": lambda *a, clip_range: value_loss(*a, clip_range=None),
        },
    ),
    Check(
        id="aggregation",
        run=weights_by_hand,
        part=aggregation_weights,
        twins={
            "masked-tokens-count": lambda lengths, mask, mode, **totals: (
                mask * aggregation_weights(lengths, torch.ones_like(mask), mode, **totals)
            ),
            "longest-here": with_totals(lambda lengths, mask: {"norm_tokens": max(lengths)}),
            "sequences-as-tokens": with_totals(lambda lengths, mask: {"total_tokens": len(lengths)}),
        },
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


def test_a_micro_batch_without_sequences_has_weights_and_losses() -> None:
    nothing = inputs((), (), ())
    for mode in MODES:
        totals = {"total_tokens": 3, "total_sequences": 2, "norm_tokens": 10}
        assert aggregation_weights((), nothing.loss_mask, mode, **totals).shape == (0,)
    for ratio in ("token", "sequence", "sequence_mean"):
        assert ppo_clip(nothing, clip_range=0.2, ratio=ratio).loss.shape == (0,)


def test_weights_need_every_sequence() -> None:
    totals = {"total_tokens": 4, "total_sequences": 1, "norm_tokens": 10}
    with pytest.raises(ValueError, match="must add up to 4 tokens, got 3"):
        aggregation_weights((3,), torch.ones(4, dtype=torch.bool), MODES[0], **totals)


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_mean"])
def test_a_hopeless_ratio_leaves_loss_and_gradient_finite(ratio) -> None:
    logprobs = torch.tensor([0.0, -300.0], requires_grad=True)
    given = LossInputs(
        logprobs=logprobs,
        old_logprobs=torch.tensor([-300.0, 0.0]),
        advantages=torch.tensor([1.0, -1.0]),
        lengths=(1, 1),
        loss_mask=torch.ones(2, dtype=torch.bool),
    )
    loss = ppo_clip(given, clip_range=0.2, ratio=ratio).loss
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([-1.2, 0.8]))
    assert logprobs.grad.tolist() == [0.0, 0.0]
