"""Small token worlds solved exactly: policy evaluation, soft value iteration, the KL frontier, the policy gradient.

An action is a token and leads to one next state, or ends the episode.  `tree` makes the world of text generation: a
state is what has been written, every state is visited at most once, the score comes with the last token.  A world may
also be a graph with cycles and a discount below 1.

All numbers are float64; policies are [S, V] arrays whose rows add up to 1, `values[s]` belongs to state s.

Source:
    Sutton & Barto 2018, chapters 3 and 13; Korbak et al. 2022 (2205.11275) for the tilted optimum.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

ENDED = -1
"""As a next state: the episode is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A Markov decision process with deterministic steps."""

    next_state: np.ndarray
    """[S, V] int, where token v leads from state s; ENDED where the episode is over."""
    rewards: np.ndarray
    """[S, V] float64, of writing token v in state s."""
    start: np.ndarray
    """[S] float64, the probability to begin in each state: prompts."""
    gamma: float = 1.0

    @property
    def num_states(self) -> int:
        """S."""
        return len(self.next_state)

    @property
    def num_tokens(self) -> int:
        """V."""
        return self.next_state.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """One way to go through a world until its episode ends."""

    states: tuple[int, ...]
    tokens: tuple[int, ...]
    rewards: tuple[float, ...]
    probability: float
    """Under the policy that `sequences` was given, the start's probability included."""

    @property
    def score(self) -> float:
        """Sum of rewards."""
        return sum(self.rewards)


def tree(
    score: Callable[[int, tuple[int, ...]], float],
    *,
    num_tokens: int,
    max_length: int,
    eos: int | None = None,
    num_prompts: int = 1,
) -> World:
    """Return the world of writing up to `max_length` tokens after one of some equally likely prompts.

    With 4 tokens, length 3, one prompt and no eos: 1 + 4 + 16 = 21 states and 64 sequences.

    Args:
        score: (prompt, tokens) -> the reward of the last token.
        num_tokens: V, eos included.
        max_length: The longest response, eos included.
        eos: The token that ends a response early.
        num_prompts: P; the states 0 .. P - 1 are the prompts.
    """
    written: list[tuple[int, tuple[int, ...]]] = [(prompt, ()) for prompt in range(num_prompts)]
    next_state, rewards = [], []
    for prompt, tokens in written:  # grows while it is read: children come after their parents
        row, row_rewards = [], []
        for token in range(num_tokens):
            longer = (*tokens, token)
            is_last = token == eos or len(longer) == max_length
            row.append(ENDED if is_last else len(written))
            row_rewards.append(score(prompt, longer) if is_last else 0.0)
            if not is_last:
                written.append((prompt, longer))
        next_state.append(row)
        rewards.append(row_rewards)
    start = np.zeros(len(written))
    start[:num_prompts] = 1 / num_prompts
    return World(next_state=np.array(next_state), rewards=np.array(rewards, dtype=float), start=start)


def bandit(rewards: np.ndarray) -> World:
    """Return the world of one token: its reward, and the end."""
    return tree(lambda _, tokens: float(rewards[tokens[0]]), num_tokens=len(rewards), max_length=1)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the policy of logits [S, V]."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def transitions(world: World, policy: np.ndarray) -> np.ndarray:
    """Return [S, S]: the probability that the policy goes from state s to state s'; rows of an end add up to < 1."""
    matrix = np.zeros((world.num_states, world.num_states))
    for state, token in zip(*np.nonzero(world.next_state != ENDED), strict=True):
        matrix[state, world.next_state[state, token]] += policy[state, token]
    return matrix


def policy_values(world: World, policy: np.ndarray, costs: np.ndarray | None = None) -> np.ndarray:
    """Return V^pi by a linear solve: (I - gamma P_pi) V = sum_a pi(a | s) r(s, a).

    Args:
        world: The world.
        policy: [S, V].
        costs: [S], what a visit yields, instead of the world's rewards.
    """
    gained = (policy * world.rewards).sum(axis=1) if costs is None else costs
    solution: np.ndarray = np.linalg.solve(np.eye(world.num_states) - world.gamma * transitions(world, policy), gained)
    return solution


def token_values(world: World, values: np.ndarray) -> np.ndarray:
    """Return Q(s, a) = r(s, a) + gamma V(s'), [S, V]; nothing follows an end."""
    return world.rewards + world.gamma * np.where(world.next_state == ENDED, 0.0, values[world.next_state])


def visits(world: World, policy: np.ndarray) -> np.ndarray:
    """Return [S]: the discounted expected number of visits to each state."""
    solution: np.ndarray = np.linalg.solve(
        np.eye(world.num_states) - world.gamma * transitions(world, policy).T, world.start
    )
    return solution


def expected_score(world: World, policy: np.ndarray) -> float:
    """Return J(pi), the expected discounted sum of rewards from the start."""
    return float(world.start @ policy_values(world, policy))


def policy_gradient(world: World, logits: np.ndarray) -> np.ndarray:
    """Return dJ / dlogits, [S, V]: visits(s) pi(a | s) (Q(s, a) - V(s)).

    Source:
        Sutton et al. 1999, the policy gradient theorem, for a softmax of its own in each state.
    """
    policy = softmax(logits)
    values = policy_values(world, policy)
    gradient: np.ndarray = visits(world, policy)[:, None] * policy * (token_values(world, values) - values[:, None])
    return gradient


def optimal_values(world: World, *, tolerance: float = 1e-13) -> np.ndarray:
    """Return V* by value iteration."""
    return _iterate(world, lambda tokens: tokens.max(axis=1), tolerance)


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftOptimum:
    """The best policy under a KL penalty: a point of the frontier."""

    beta: float
    policy: np.ndarray
    soft_values: np.ndarray
    """V*(s) = beta log sum_a reference(a | s) exp(Q*(s, a) / beta)."""
    score: float
    """Expected score, the penalty not counted."""
    kl: float
    """Expected nats per sequence to the reference policy; discounted like rewards."""


def soft_optimum(world: World, reference: np.ndarray, beta: float, *, tolerance: float = 1e-13) -> SoftOptimum:
    """Return argmax over policies of E[score] - beta KL(policy || reference), by soft value iteration.

    Source:
        Ziegler et al. 2019 (1909.08593), Eq. 1-2; Rafailov et al. 2023 (2305.18290), Eq. 4, token by token.
    """

    def soft(tokens: np.ndarray) -> np.ndarray:
        best = np.where(reference > 0, tokens, -np.inf).max(axis=1)
        weighed = (reference * np.exp((tokens - best[:, None]) / beta)).sum(axis=1)
        return best + beta * np.log(weighed)

    values = _iterate(world, soft, tolerance)
    policy = reference * np.exp((token_values(world, values) - values[:, None]) / beta)
    policy /= policy.sum(axis=1, keepdims=True)
    kl = float(world.start @ policy_values(world, policy, relative_entropy(policy, reference)))
    return SoftOptimum(beta=beta, policy=policy, soft_values=values, score=expected_score(world, policy), kl=kl)


def frontier_at_kl(world: World, reference: np.ndarray, kl: float) -> SoftOptimum:
    """Return the best policy among those at most `kl` nats from the reference, by bisection of log beta.

    No policy at that KL scores more; beta is the slope d score / d KL there.
    """
    low, high = -8.0, 12.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if soft_optimum(world, reference, np.exp(middle)).kl < kl else (middle, high)
    return soft_optimum(world, reference, float(np.exp(high)))


def relative_entropy(policy: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return KL(policy || reference) over the last axis; a token that is never written costs nothing."""
    is_used = policy > 0
    ratio = np.divide(policy, reference, where=is_used, out=np.ones_like(policy))
    nats: np.ndarray = (policy * np.log(ratio)).sum(axis=-1)
    return nats


def sequences(world: World, policy: np.ndarray) -> Iterator[Sequence]:
    """Yield every sequence of a world without cycles, with its probability under the policy."""
    for state in np.flatnonzero(world.start):
        yield from _continued(
            world, policy, Sequence(states=(int(state),), tokens=(), rewards=(), probability=float(world.start[state]))
        )


def _continued(world: World, policy: np.ndarray, so_far: Sequence) -> Iterator[Sequence]:
    state = so_far.states[-1]
    for token in range(world.num_tokens):
        following = int(world.next_state[state, token])
        longer = Sequence(
            states=so_far.states if following == ENDED else (*so_far.states, following),
            tokens=(*so_far.tokens, token),
            rewards=(*so_far.rewards, float(world.rewards[state, token])),
            probability=so_far.probability * float(policy[state, token]),
        )
        if following == ENDED:
            yield longer
        else:
            yield from _continued(world, policy, longer)


def _iterate(world: World, backup: Callable[[np.ndarray], np.ndarray], tolerance: float) -> np.ndarray:
    values = np.zeros(world.num_states)
    for _ in range(100_000):
        better = backup(token_values(world, values))
        if np.abs(better - values).max() <= tolerance:
            return better
        values = better
    raise AssertionError(f"value iteration must settle within {tolerance}; is gamma {world.gamma} < 1 on a cycle?")
