"""Estimators of the policy gradient against the exact one: which are unbiased, which are not, and what those climb.

The world is small enough to write down every sequence, so an estimator's expectation is a finite sum over all
samples, or all pairs of samples, that it could be given: no tolerance for noise.  Drawn samples are z-tested too.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats

from learner.advantages import gae, group_relative, leave_one_out, n_step_advantages, returns_to_go
from learner.losses import LossInputs, aggregation_weights, policy_gradient, ppo_clip
from tests.checks import Case, Check, with_twins
from tests.token_mdp import World, policy_values, sequences, softmax, tree
from tests.token_mdp import policy_gradient as exact_policy_gradient

Advantages = Callable[..., torch.Tensor]
SCORES = np.random.default_rng(0).normal(size=(2, 4, 4, 4))
SCORES[1] += 3.0  # the second prompt is the easier one


def three_letters(prompt: int, tokens: tuple[int, ...]) -> float:
    return float(SCORES[(prompt, *tokens)])


def sooner_is_better(prompt: int, tokens: tuple[int, ...]) -> float:
    """Of 2 prompts with rewards of other sizes; token 0 ends the response."""
    return (1.0, 5.0)[prompt] * (tokens.count(1) - 0.3 * len(tokens) + 0.5 * tokens[0]) + prompt


LETTERS = tree(three_letters, num_tokens=4, max_length=3, num_prompts=2)
LETTER_LOGITS = np.random.default_rng(1).normal(size=(LETTERS.num_states, 4))
ENDING = tree(sooner_is_better, num_tokens=3, max_length=3, eos=0, num_prompts=2)
ENDING_LOGITS = np.random.default_rng(2).normal(size=(ENDING.num_states, 3)) * 0.7


@dataclass(frozen=True, slots=True)
class Samples:
    """Sequences of a world, flat: S tokens of N sequences."""

    states: torch.Tensor
    tokens: torch.Tensor
    rewards: list[torch.Tensor]
    lengths: tuple[int, ...]
    prompts: np.ndarray
    probabilities: torch.Tensor
    """[N] of each sequence, given its prompt."""
    scores: torch.Tensor


def every_sequence(world: World, logits: np.ndarray) -> Samples:
    found = list(sequences(world, softmax(logits)))
    prompts = np.array([one.states[0] for one in found])
    return Samples(
        torch.tensor([state for one in found for state in one.states]),
        torch.tensor([token for one in found for token in one.tokens]),
        [torch.tensor(one.rewards, dtype=torch.float64) for one in found],
        tuple(len(one.tokens) for one in found),
        prompts,
        torch.tensor([one.probability for one in found], dtype=torch.float64) / torch.from_numpy(world.start[prompts]),
        torch.tensor([one.score for one in found], dtype=torch.float64),
    )


LETTER_SAMPLES = every_sequence(LETTERS, LETTER_LOGITS)
ENDING_SAMPLES = every_sequence(ENDING, ENDING_LOGITS)


def ascent(samples: Samples, logits: np.ndarray, advantages: torch.Tensor, weights: torch.Tensor) -> np.ndarray:
    """Return minus the gradient of sum(weights * loss), [S, V], through the shipped loss and autograd."""
    leaf = torch.from_numpy(logits).clone().requires_grad_()
    logprobs = leaf.log_softmax(-1)[samples.states, samples.tokens]
    mask = torch.ones_like(samples.tokens, dtype=torch.bool)
    flat = LossInputs(
        logprobs=logprobs,
        old_logprobs=logprobs.detach(),
        advantages=advantages,
        lengths=samples.lengths,
        loss_mask=mask,
    )
    of_reinforce, of_ppo = (
        torch.autograd.grad((weights * part.loss).sum(), leaf, retain_graph=True)[0]
        for part in (policy_gradient(flat), ppo_clip(flat, clip_range=0.2))
    )
    torch.testing.assert_close(of_reinforce, of_ppo)  # C2: at the old policy they are the same
    return -of_reinforce.numpy()


def per_token(samples: Samples, of_sequences: torch.Tensor) -> torch.Tensor:
    return of_sequences.repeat_interleave(torch.tensor(samples.lengths))


def critic(world: World, logits: np.ndarray) -> torch.Tensor:
    """Return values that are wrong, with those that follow the last token: a baseline need not be right."""
    exact = policy_values(world, softmax(logits))
    return torch.from_numpy(exact + np.random.default_rng(3).normal(size=world.num_states))


def estimator_is_unbiased(advantages: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """`advantages(rewards [T], values [T + 1], discounts [T])` of single sequences, summed over all of them."""
    values = critic(LETTERS, LETTER_LOGITS)
    rows = zip(LETTER_SAMPLES.rewards, LETTER_SAMPLES.states.split(LETTER_SAMPLES.lengths), strict=True)
    of_tokens = torch.cat(
        [
            advantages(row, torch.cat([values[states], values.new_zeros(1)]), torch.ones_like(row))
            for row, states in rows
        ]
    )
    weights = per_token(LETTER_SAMPLES, LETTER_SAMPLES.probabilities / 2)
    expected = exact_policy_gradient(LETTERS, LETTER_LOGITS)
    assert ascent(LETTER_SAMPLES, LETTER_LOGITS, of_tokens, weights) == pytest.approx(expected, abs=1e-12)


def expected_group_ascent(
    world: World, logits: np.ndarray, samples: Samples, advantages: Advantages, mode: str
) -> np.ndarray:
    """Return the expected step of one prompt's groups of two, over all pairs of sequences, mean over the prompts.

    The pair's loss is summed with the shipped weights of its minibatch, as if each group were a minibatch.
    """
    total = torch.zeros(len(samples.lengths), dtype=torch.float64)  # of each sequence: sum of advantage * weight
    for prompt in np.flatnonzero(world.start):
        members = np.flatnonzero(samples.prompts == prompt).tolist()
        for first, second in itertools.product(members, members):
            pair = torch.tensor([first, second])
            lengths = tuple(samples.lengths[member] for member in (first, second))
            weights = aggregation_weights(
                lengths,
                torch.ones(sum(lengths), dtype=torch.bool),
                mode,
                total_tokens=sum(lengths),
                total_sequences=2,
                norm_tokens=3,
            )
            of_each = torch.stack([row[0] for row in weights.double().split(list(lengths))])
            probability = samples.probabilities[pair].prod() * float(world.start[prompt])
            total.index_add_(0, pair, probability * advantages(samples.scores[pair]) * of_each)
    return ascent(samples, logits, per_token(samples, total), torch.ones(sum(samples.lengths), dtype=torch.float64))


def leave_one_out_is_unbiased(advantages: Advantages) -> None:
    """The mean over a group of two is the gradient itself, no factor missing."""
    actual = expected_group_ascent(ENDING, ENDING_LOGITS, ENDING_SAMPLES, advantages, "sequence_mean_token_sum")
    assert actual == pytest.approx(exact_policy_gradient(ENDING, ENDING_LOGITS), abs=1e-7)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum() / math.sqrt((one**2).sum() * (other**2).sum()))


def dr_grpo_climbs_the_score(parts: tuple[Advantages, str]) -> None:
    """Expectation over groups of K = 2, divided by a constant of 3 tokens: (K - 1) / K / 3 of the gradient, exactly."""
    actual = expected_group_ascent(ENDING, ENDING_LOGITS, ENDING_SAMPLES, *parts)
    expected = exact_policy_gradient(ENDING, ENDING_LOGITS)
    assert cosine(actual, expected) == pytest.approx(1.0, abs=1e-12)
    assert actual == pytest.approx(expected / 6, abs=1e-7)


def tilted_gradient(of_sequences: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the mean over prompts of E[f(scores, probabilities, lengths) * gradient of log pi], by autograd."""
    total = torch.zeros(len(ENDING_SAMPLES.lengths), dtype=torch.float64)
    for prompt in np.flatnonzero(ENDING.start):
        members = np.flatnonzero(ENDING_SAMPLES.prompts == prompt)
        probabilities = ENDING_SAMPLES.probabilities[members].numpy()
        lengths = np.array(ENDING_SAMPLES.lengths)[members]
        tilt = of_sequences(ENDING_SAMPLES.scores[members].numpy(), probabilities, lengths)
        total[members] = torch.from_numpy(tilt * probabilities * ENDING.start[prompt])
    leaf = torch.from_numpy(ENDING_LOGITS).clone().requires_grad_()
    logprobs = leaf.log_softmax(-1)[ENDING_SAMPLES.states, ENDING_SAMPLES.tokens]
    return torch.autograd.grad((per_token(ENDING_SAMPLES, total) * logprobs).sum(), leaf)[0].numpy()


def grpo_climbs_the_win_rate(parts: tuple[Advantages, str]) -> None:
    """Two scores are always one standard deviation times sqrt(2) apart: A = +-1 / sqrt(2), how far apart is forgotten.

    So each prompt weighs the same and a sequence counts by P(it wins) - P(it loses) against another of the same prompt.
    """
    actual = expected_group_ascent(ENDING, ENDING_LOGITS, ENDING_SAMPLES, *parts)

    def win_rate(scores: np.ndarray, probabilities: np.ndarray, _: np.ndarray) -> np.ndarray:
        return np.sign(scores[:, None] - scores[None, :]) @ probabilities / math.sqrt(2)

    assert actual == pytest.approx(tilted_gradient(win_rate), abs=1e-6)
    assert cosine(actual, exact_policy_gradient(ENDING, ENDING_LOGITS)) < 0.95


def mean_over_tokens_climbs_something_else(parts: tuple[Advantages, str]) -> None:
    """1 / |y| makes a short sequence's token heavier: E[(R - E R) / 2 / |y| * gradient of log pi]."""
    actual = expected_group_ascent(ENDING, ENDING_LOGITS, ENDING_SAMPLES, *parts)
    expected = tilted_gradient(lambda scores, odds, lengths: (scores - odds @ scores) / 2 / lengths)
    assert actual == pytest.approx(expected, abs=1e-7)
    assert cosine(actual, exact_policy_gradient(ENDING, ENDING_LOGITS)) < 0.95


def gradients_of_sequences(of_tokens: torch.Tensor) -> np.ndarray:
    """Return [N, S * V]: for each of the `LETTERS` sequences, sum over its tokens of advantage * gradient of log pi."""
    policy = softmax(LETTER_LOGITS)
    rows = np.zeros((len(LETTER_SAMPLES.lengths), *LETTER_LOGITS.shape))
    owners = np.repeat(np.arange(len(rows)), LETTER_SAMPLES.lengths)
    states, tokens = LETTER_SAMPLES.states.numpy(), LETTER_SAMPLES.tokens.numpy()
    np.add.at(rows, (owners, states), -of_tokens.numpy()[:, None] * policy[states])
    np.add.at(rows, (owners, states, tokens), of_tokens.numpy())
    return rows.reshape(len(rows), -1)


SCORE_FUNCTIONS = gradients_of_sequences(torch.ones(len(LETTER_SAMPLES.tokens), dtype=torch.float64))


def draw_batches(num_batches: int, per_prompt: int) -> np.ndarray:
    """Return [batches, 2, K] sequences, K of each prompt."""
    generator = np.random.default_rng(4)
    drawn = []
    for prompt in (0, 1):
        members = np.flatnonzero(LETTER_SAMPLES.prompts == prompt)
        odds = LETTER_SAMPLES.probabilities[members].numpy()
        drawn.append(generator.choice(members, size=(num_batches, per_prompt), p=odds / odds.sum()))
    return np.stack(drawn, axis=1)


def assert_mean_is_the_gradient(estimates: np.ndarray) -> None:
    """z-test along 32 directions, each a sum over all parameters: a right estimator fails once in a thousand times.

    A single parameter of a rare state is drawn too seldom for a normal distribution.
    """
    directions = np.random.default_rng(5).normal(size=(LETTER_LOGITS.size, 32))
    errors = (estimates - exact_policy_gradient(LETTERS, LETTER_LOGITS).reshape(-1)) @ directions
    z = errors.mean(axis=0) / (errors.std(axis=0, ddof=1) / math.sqrt(len(errors)))
    assert np.abs(z).max() < stats.norm.isf(0.5e-3 / 32)


def estimates_of(advantages: torch.Tensor, drawn: np.ndarray) -> np.ndarray:
    """Return [batches, S * V], each the mean over a batch's sequences of advantage * gradient of log pi."""
    weights = np.zeros((len(drawn), len(SCORE_FUNCTIONS)))
    rows = np.arange(len(drawn))[:, None]
    np.add.at(weights, (rows, drawn.reshape(len(drawn), -1)), advantages.reshape(len(drawn), -1).numpy())
    return weights @ SCORE_FUNCTIONS / drawn[0].size


def drawn_groups_are_unbiased(advantages: Advantages) -> None:
    drawn = draw_batches(2000, per_prompt=4)
    scores = LETTER_SAMPLES.scores[torch.from_numpy(drawn)]
    of_groups = torch.stack([advantages(group) for group in scores.flatten(0, 1)])
    assert_mean_is_the_gradient(estimates_of(of_groups, drawn))


def drawn_tokens_are_unbiased(advantages: Advantages) -> None:
    values = critic(LETTERS, LETTER_LOGITS)
    states = LETTER_SAMPLES.states.reshape(-1, 3)
    rewards = torch.stack(LETTER_SAMPLES.rewards)
    padded = torch.cat([values[states], values.new_zeros(len(states), 1)], dim=1)
    table = gradients_of_sequences(advantages(rewards, padded, torch.ones_like(rewards)).reshape(-1))
    drawn = draw_batches(10_000, per_prompt=1).reshape(-1, 2)
    assert_mean_is_the_gradient(table[drawn].mean(axis=1))


def a_nearer_baseline_has_less_variance(baselines: dict[str, Advantages]) -> None:
    """Total variance of a batch's estimate, all three unbiased: leave-one-out < mean of the batch < none."""
    drawn = draw_batches(2000, per_prompt=4)
    scores = LETTER_SAMPLES.scores[torch.from_numpy(drawn)]
    variances = []
    for name in ("leave_one_out", "batch_mean", "none"):
        estimates = estimates_of(torch.stack([baselines[name](batch) for batch in scores]), drawn)
        assert_mean_is_the_gradient(estimates)
        variances.append(estimates.var(axis=0).sum())
    assert 1.2 * variances[0] < variances[1]
    assert 1.2 * variances[1] < variances[2]


def baselines(**planted: Advantages) -> dict[str, Advantages]:
    """Each takes the scores of a batch, [2 prompts, 4]; the mean of the batch knows its own sample: 8 / 7."""
    shipped = {
        "leave_one_out": lambda scores: torch.stack([leave_one_out(row) for row in scores]),
        "batch_mean": lambda scores: (scores - scores.mean()) * 8 / 7,
        "none": lambda scores: scores,
    }
    return {**shipped, **planted}


SUM, MEAN, NORM = "sequence_mean_token_sum", "sequence_mean_token_mean", "sequence_mean_token_sum_norm"
CENTERED, SCALED = ((lambda x, s=scale: group_relative(x, scale_by_std=s)) for scale in (False, True))

CHECKS = (
    Check(
        id="C3-reinforce",
        run=estimator_is_unbiased,
        part=lambda rewards, _, discounts: returns_to_go(rewards, discounts),
        twins={
            "own-reward-only": lambda rewards, *_: rewards,
            "one-token-early": lambda rewards, _, discounts: returns_to_go(rewards.roll(-1), discounts),
        },
    ),
    Check(
        id="C3-reinforce-value-baseline",
        run=estimator_is_unbiased,
        part=lambda rewards, values, discounts: returns_to_go(rewards, discounts) - values[:-1],
        twins={
            "baseline-knows-the-token": lambda rewards, values, discounts: (
                returns_to_go(rewards, discounts) - values[1:]
            )
        },
    ),
    Check(
        id="C3-gae-lambda-1",
        run=estimator_is_unbiased,
        part=lambda *a: gae(*a, 1.0),
        twins={
            "lambda-0.9-of-a-wrong-critic": lambda *a: gae(*a, 0.9),
            "values-one-state-late": lambda rewards, values, discounts: gae(
                rewards, torch.cat([values[1:], values[-1:]]), discounts, 1.0
            ),
            "end-bootstraps": lambda rewards, values, discounts: gae(
                rewards, torch.cat([values[:-1], values[-2:-1]]), discounts, 1.0
            ),
        },
    ),
    Check(
        id="C3-n-step-to-the-end",
        run=estimator_is_unbiased,
        part=lambda *a: n_step_advantages(*a, 3),
        twins={"two-steps-of-a-wrong-critic": lambda *a: n_step_advantages(*a, 2)},
    ),
    Check(
        id="C3-leave-one-out",
        run=leave_one_out_is_unbiased,
        part=leave_one_out,
        twins={"own-score-in-the-mean": CENTERED, "standard-deviations": SCALED, "no-baseline-of-two": lambda x: 2 * x},
    ),
    Check(
        id="C3-leave-one-out-drawn",
        run=drawn_groups_are_unbiased,
        part=leave_one_out,
        twins={
            "own-score-in-the-mean": CENTERED,
            "standard-deviations": SCALED,
            "another's-score": lambda x: x.roll(1),
        },
    ),
    Check(
        id="C3-gae-lambda-1-drawn",
        run=drawn_tokens_are_unbiased,
        part=lambda *a: gae(*a, 1.0),
        twins={
            "lambda-0.5-of-a-wrong-critic": lambda *a: gae(*a, 0.5),
            "one-token-early": lambda rewards, *a: gae(rewards.roll(-1, -1), *a, 1.0),
        },
    ),
    Check(
        id="C3-variance",
        run=a_nearer_baseline_has_less_variance,
        part=baselines(),
        twins={
            "mean-over-prompts": baselines(leave_one_out=lambda scores: leave_one_out(scores.flatten()).view(2, 4)),
            "own-score-in-the-mean": baselines(
                leave_one_out=lambda scores: torch.stack([CENTERED(row) for row in scores])
            ),
        },
    ),
    Check(
        id="C4-dr-grpo",
        run=dr_grpo_climbs_the_score,
        part=(CENTERED, NORM),
        twins={"standard-deviations": (SCALED, NORM), "mean-over-tokens": (CENTERED, MEAN), "no-norm": (CENTERED, SUM)},
    ),
    Check(
        id="C4-standard-deviations",
        run=grpo_climbs_the_win_rate,
        part=(SCALED, SUM),
        twins={
            "of-the-population": (lambda x: (x - x.mean()) / (x.std(unbiased=False) + 1e-6), SUM),
            "left-out": (CENTERED, SUM),
        },
    ),
    Check(
        id="C4-mean-over-tokens",
        run=mean_over_tokens_climbs_something_else,
        part=(CENTERED, MEAN),
        twins={"sum": (CENTERED, SUM), "all-tokens-alike": (CENTERED, "token_mean")},
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()
