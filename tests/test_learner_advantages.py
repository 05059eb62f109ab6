"""GAE, whitening, token rewards: equalities by hand, and the wrong variants they must catch."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from learner.advantages import (
    align_right,
    cut_right,
    gae,
    is_terminal,
    token_moments,
    token_rewards,
    whiten,
    with_bootstrap,
)

REWARDS = torch.tensor([0.0, 0.0, 1.0, 0.0, -0.5])
VALUES = torch.tensor([1.0, 4.0, -3.0, -2.0, -1.0, -1.0])


def test_lambda_one_is_the_return_and_lambda_zero_the_temporal_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(7, generator=generator, dtype=torch.float64)
    values = torch.randn(8, generator=generator, dtype=torch.float64)
    discounts = torch.full_like(rewards, 0.9)
    powers = 0.9 ** torch.arange(8, dtype=torch.float64)
    returns = torch.stack([(powers[: 7 - t] * rewards[t:]).sum() + powers[7 - t] * values[7] for t in range(7)])
    torch.testing.assert_close(gae(rewards, values, discounts, 1.0), returns - values[:-1])
    torch.testing.assert_close(gae(rewards, values, discounts, 0.0), rewards + 0.9 * values[1:] - values[:-1])


def gae_ragged(rewards, values, *, gamma, gae_lambda):
    aligned = align_right(rewards)
    advantages = gae(aligned, align_right(values), torch.full_like(aligned, gamma), gae_lambda)
    return cut_right(advantages, [len(row) for row in rewards])


def check_ragged(implementation: Callable[..., list[torch.Tensor]]) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = (3, 1, 6)
    rewards = [torch.randn(n, generator=generator) for n in lengths]
    values = [torch.randn(n + 1, generator=generator) for n in lengths]
    actual = implementation(rewards, values, gamma=0.97, gae_lambda=0.9)
    for one, reward, value in zip(actual, rewards, values, strict=True):
        assert torch.equal(one, gae(reward, value, torch.full_like(reward, 0.97), 0.9))


def ragged_padded_at_the_end(rewards, values, *, gamma, gae_lambda):
    longest = max(len(row) for row in rewards)
    pad = torch.nn.functional.pad
    padded_rewards = torch.stack([pad(row, (0, longest - len(row))) for row in rewards])
    padded_values = torch.stack([pad(row, (0, longest + 1 - len(row))) for row in values])
    advantages = gae(padded_rewards, padded_values, torch.full_like(padded_rewards, gamma), gae_lambda)
    return [row[: len(reward)] for row, reward in zip(advantages, rewards, strict=True)]


def test_responses_of_different_lengths_give_the_bits_of_one_by_one() -> None:
    check_ragged(gae_ragged)


def test_a_bootstrapped_response_padded_at_its_end_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_ragged(ragged_padded_at_the_end)


def test_gae_refuses_values_without_a_last_one() -> None:
    with pytest.raises(ValueError, match=r"values must be \[..., T \+ 1\]"):
        gae(REWARDS, VALUES[:-1], torch.ones(5), 1.0)


@pytest.mark.parametrize(
    ("finish_reason", "penalty", "expected"),
    [("eos", None, True), ("stop", None, True), ("length", None, False), ("length", 1.0, True), ("eos", 1.0, True)],
)
def test_only_a_cut_off_response_without_a_penalty_bootstraps(finish_reason, penalty, expected) -> None:
    assert is_terminal(finish_reason, missing_eos_penalty=penalty) is expected


def test_the_end_of_an_episode_in_the_values_equals_a_discount_of_zero() -> None:
    rewards, values = REWARDS, VALUES
    ended = with_bootstrap(values, is_terminal=True)
    assert ended.tolist() == [1.0, 4.0, -3.0, -2.0, -1.0, 0.0]
    assert torch.equal(with_bootstrap(values, is_terminal=False), values)
    discounts = torch.full_like(rewards, 0.99)
    cut = discounts.clone()
    cut[-1] = 0.0
    torch.testing.assert_close(gae(rewards, ended, discounts, 0.9), gae(rewards, values, cut, 0.9))


def check_token_rewards(implementation: Callable[..., torch.Tensor]) -> None:
    logprobs = torch.tensor([-1.0, -0.5, -2.0])
    ref_logprobs = torch.tensor([-1.5, -0.5, -1.0])
    # The policy likes token 0 more than the reference does, and token 2 less.
    actual = implementation(3.0, logprobs, ref_logprobs, 0.1)
    torch.testing.assert_close(actual, torch.tensor([-0.05, 0.0, 3.1]))
    # With gamma 1 the return is the score less kl_coef times the sequence's KL estimate.
    assert actual.sum().item() == pytest.approx(3.0 - 0.1 * (logprobs - ref_logprobs).sum().item())


def test_the_penalty_is_on_every_token_and_the_score_on_the_last() -> None:
    check_token_rewards(token_rewards)
    logprobs = torch.tensor([-1.0, -0.5])
    assert token_rewards(2.0, logprobs, None, 0.0).tolist() == [0.0, 2.0]
    assert logprobs.tolist() == [-1.0, -0.5]


@pytest.mark.parametrize(
    "twin",
    [
        lambda score, logprobs, ref, coef: token_rewards(score, ref, logprobs, coef),
        lambda score, logprobs, ref, coef: token_rewards(score, logprobs, ref, coef).roll(1),
        lambda score, logprobs, ref, coef: token_rewards(0.0, logprobs, ref, coef) + score,
    ],
    ids=["kl sign", "score one token early", "score on every token"],
)
def test_wrong_token_rewards_are_caught(twin) -> None:
    with pytest.raises(AssertionError):
        check_token_rewards(twin)


def test_token_rewards_refuse_what_would_be_lost() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        token_rewards(1.0, torch.empty(0), torch.empty(0), 0.1)
    with pytest.raises(ValueError, match="ref_logprobs must be given"):
        token_rewards(1.0, torch.zeros(2), None, 0.1)


def whiten_all(values: torch.Tensor, *, shift_mean: bool) -> torch.Tensor:
    moments = token_moments(values, torch.ones_like(values, dtype=torch.bool))
    return whiten(values, moments.mean, moments.variance, shift_mean=shift_mean)


def test_constant_tokens_whiten_to_zero() -> None:
    assert whiten_all(torch.full((4,), 0.1), shift_mean=True).abs().max() < 1e-3
    assert whiten(torch.tensor([2.0]), 2.0, 0.0).item() == 0.0


def moments_over_ranks(moments: Callable[..., object], shares: list[torch.Tensor]) -> list[object]:
    """Run `moments` as several ranks would, one thread each, with a collective that waits for all of them."""
    barrier = threading.Barrier(len(shares), timeout=20)
    slots: list[torch.Tensor] = [torch.empty(0)] * len(shares)

    def one_rank(rank: int) -> object:
        def all_reduce(values: torch.Tensor) -> torch.Tensor:
            slots[rank] = values
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        mask = torch.ones_like(shares[rank], dtype=torch.bool)
        return moments(shares[rank], mask, all_reduce=all_reduce)

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(one_rank, range(len(shares))))


def check_moments_over_ranks(moments: Callable[..., object]) -> None:
    # A mean that is large against the spread: one pass of E[x^2] - E[x]^2 in float32 has no digit left.
    tokens = 1000.0 + torch.randn(600, generator=torch.Generator().manual_seed(2))
    whole = tokens.double()
    for cuts in ([600], [100, 500], [1, 0, 599], [200, 200, 200]):
        results = moments_over_ranks(moments, list(tokens.split(cuts)))
        assert all(result == results[0] for result in results)
        assert results[0].count == 600
        assert results[0].mean == pytest.approx(whole.mean().item(), rel=1e-14)
        assert results[0].variance == pytest.approx(whole.var(unbiased=False).item(), rel=1e-12)


def one_pass_moments(values, mask, *, all_reduce):
    chosen = values[mask]
    total, squares, count = all_reduce(torch.stack([chosen.sum(), chosen.square().sum(), mask.sum().float()])).tolist()
    return type("M", (), {"mean": total / count, "variance": squares / count - (total / count) ** 2, "count": count})()


def moments_of_one_rank(values, mask, *, all_reduce):
    all_reduce(torch.zeros(1))
    return token_moments(values, mask)


def test_moments_do_not_depend_on_the_split_over_ranks() -> None:
    check_moments_over_ranks(token_moments)


@pytest.mark.parametrize("twin", [one_pass_moments, moments_of_one_rank])
def test_moments_that_cancel_or_stay_on_one_rank_are_caught(twin) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check_moments_over_ranks(twin)


def test_masked_tokens_do_not_count() -> None:
    values = torch.tensor([1.0, 99.0, 3.0])
    moments = token_moments(values, torch.tensor([True, False, True]))
    assert (moments.mean, moments.variance, moments.count) == (2.0, 1.0, 2)
    with pytest.raises(ValueError, match="at least one loss token"):
        token_moments(values, torch.zeros(3, dtype=torch.bool))
