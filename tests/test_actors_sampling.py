import numpy as np
import pytest
import torch

from actors.engine import SamplingParams
from actors.sampling import group_seed, sample, uniforms


def params(**changes) -> SamplingParams:
    return SamplingParams(max_new_tokens=8, **changes)


def draw(logits: torch.Tensor, u: list[float], **changes) -> list[int]:
    tokens, _ = sample(logits.expand(len(u), -1), [params(**changes)] * len(u), np.array(u))
    return tokens.tolist()


def chi_square_p(counts: np.ndarray, probs: np.ndarray) -> float:
    """Upper tail of the chi-square distribution by the regularised incomplete gamma function."""
    expected = counts.sum() * probs
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def test_splitmix_matches_the_published_stream():
    # Reference outputs of SplitMix64 from seed 0 and from the golden-gamma state after it.
    first, second = 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4
    from actors.sampling import _splitmix

    states = np.array([0, 0x9E3779B97F4A7C15], dtype=np.uint64)
    assert _splitmix(states).tolist() == [first, second]


def test_uniforms_are_pure_distinct_and_in_range():
    seeds = np.full(4096, group_seed(1, "0/q"), dtype=np.uint64)
    index, position = np.divmod(np.arange(4096), 64)
    u = uniforms(seeds, index, position)
    assert u.min() >= 0
    assert u.max() < 1
    assert len(np.unique(u)) == 4096
    assert np.array_equal(u[::-1], uniforms(seeds[::-1], index[::-1], position[::-1]))  # no state
    counts = np.bincount((u * 16).astype(int), minlength=16)
    assert chi_square_p(counts, np.full(16, 1 / 16)) > 0.001
    # Neighbours in position and in sample index are unrelated.
    grid = u.reshape(64, 64) - 0.5
    assert abs((grid[:, 1:] * grid[:, :-1]).mean() * 12) < 0.05
    assert abs((grid[1:] * grid[:-1]).mean() * 12) < 0.05


def test_group_seed_depends_on_both_and_fits_63_bits():
    seeds = {group_seed(run, group) for run in (0, 1) for group in ("0/a", "0/b", "1/a")}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert group_seed(1, "2/x") != group_seed(12, "/x")  # the separator keeps the parts apart


def test_inverse_of_a_hand_made_distribution():
    logits = torch.tensor([[0.1, 0.0, 0.4, 0.5]]).log()  # cumulative 0.1, 0.1, 0.5, 1
    assert draw(logits, [0.0, 0.05, 0.15, 0.4999, 0.5001, 0.999]) == [0, 0, 2, 2, 3, 3]


def test_largest_uniform_never_draws_a_token_without_probability():
    logits = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf]])
    below_one = float(np.nextafter(1.0, 0.0))
    assert draw(logits, [below_one]) == [1]
    wide = torch.full((1, 5000), -20.0)
    wide[0, 4000:] = -torch.inf
    assert draw(wide, [below_one]) == [3999]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_distribution_is_softmax_of_tempered_logits(temperature):
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5, 0.3]])
    count = 20_000
    u = uniforms(np.full(count, 7), np.zeros(count), np.arange(count))
    tokens, logprobs = sample(logits.expand(count, -1), [params(temperature=temperature)] * count, u)
    counts = np.bincount(tokens.numpy(), minlength=6)
    probs = torch.softmax(logits[0].double() / temperature, 0).numpy()
    assert chi_square_p(counts, probs) > 0.001
    np.testing.assert_allclose(logprobs, np.log(probs)[tokens], atol=1e-6)
    # Planted bug: the temperature forgotten in the draw is seen by the same test.
    wrong = torch.softmax(logits[0].double() / (temperature * 1.2), 0).numpy()
    assert chi_square_p(counts, wrong) < 0.001
    if temperature != 1.0:  # and forgotten in the log-probs
        assert not np.allclose(torch.log_softmax(logits[0], 0)[tokens], logprobs, atol=1e-2)


def test_greedy_takes_the_best_and_records_temperature_one():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    tokens, logprobs = sample(logits, [params(temperature=0.0)], np.array([0.999]))
    assert tokens.tolist() == [1]
    assert logprobs[0].item() == pytest.approx(3 - np.log(1 + np.e + np.e**3), abs=1e-6)


def test_truncation_limits_the_draw_but_not_the_logprob():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    grid = np.linspace(0, 0.9999, 400).tolist()
    assert set(draw(logits, grid, top_k=2)) == {0, 1}
    assert set(draw(logits, grid, top_p=0.8)) == {0, 1}  # the token that reaches the threshold stays
    assert set(draw(logits, grid, top_p=0.81)) == {0, 1, 2}
    assert set(draw(logits, grid, top_k=1, top_p=0.9)) == {0}
    # 0.5 and 0.3 renormalised: 0.625 of the uniforms fall on the first.
    assert draw(logits, [0.62, 0.63], top_k=2) == [0, 1]
    tokens, logprobs = sample(logits, [params(top_k=2)], np.array([0.99]))
    assert logprobs[0].item() == pytest.approx(np.log(0.3), abs=1e-6)
    assert tokens.tolist() == [1]


def test_a_row_has_the_same_bits_in_any_batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 49_153, generator=generator) * 3
    mixed = [params(temperature=t, top_k=k, top_p=p) for t in (1.0, 0.7) for k in (0, 5) for p in (1.0, 0.9)] * 3
    mixed += [params(temperature=0.0)] * 8
    u = uniforms(np.arange(32), np.zeros(32), np.zeros(32))
    tokens, logprobs = sample(logits, mixed, u)
    for rows in ([3], [31], [5, 1], list(range(7, 20)), list(range(31, -1, -1))):
        some_tokens, some_logprobs = sample(logits[rows], [mixed[row] for row in rows], u[rows])
        assert torch.equal(some_tokens, tokens[rows])
        assert torch.equal(some_logprobs, logprobs[rows])


def test_non_finite_logits_give_a_nan_logprob():
    logits = torch.zeros(2, 5)
    logits[1, 2] = torch.nan
    _, logprobs = sample(logits, [params()] * 2, np.array([0.3, 0.3]))
    assert logprobs.isnan().tolist() == [False, True]
