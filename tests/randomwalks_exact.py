"""RandomWalks solved exactly: the best mean optimality for each KL from a reference walk.

Soft value iteration (the closed form of KL-regularised control): with a Markov reference walk p,

    V_0(i) = 0
    V_t(i) = beta log sum_j p(j | i) exp(Q_t(j) / beta)
    pi_t(j | i) = p(j | i) exp((Q_t(j) - V_t(i)) / beta)

where t moves are left and Q_t(j) is the score if j is the goal, else V_{t-1}(j).  No policy lies above the curve of
(KL, value) that beta traces.
"""

from dataclasses import dataclass

import numpy as np

from examples.randomwalks.graph import GOAL, MAX_NODES, NODES, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A point of the frontier: means over the starts that can reach the goal."""

    value: float
    kl: float  # nats per walk


def uniform_legal_walk(task: Task) -> np.ndarray:
    """Return [N, N] transition probabilities: each legal step equally likely."""
    return task.edges / task.edges.sum(axis=1, keepdims=True)


def frontier(task: Task, beta: float, reference: np.ndarray | None = None) -> Point:
    """Return the point of the frontier at penalty `beta` (`inf`: the reference itself)."""
    reference = uniform_legal_walk(task) if reference is None else reference
    points = [_solve(task, NODES.index(start), beta, reference) for start in task.starts]
    value, kl = np.mean(points, axis=0)
    return Point(value=float(value), kl=float(kl))


def _solve(task: Task, start: int, beta: float, reference: np.ndarray) -> tuple[float, float]:
    soft, value, kl = np.zeros(len(NODES)), np.zeros(len(NODES)), np.zeros(len(NODES))
    for moves_left in range(1, MAX_NODES):
        num_nodes = MAX_NODES + 1 - moves_left  # of a walk that arrives by this move
        soft[GOAL] = value[GOAL] = max(0.0, (MAX_NODES - num_nodes) / (MAX_NODES - task.shortest[start]))
        kl[GOAL] = 0.0
        policy = _best_policy(reference, soft, beta)
        kl = _relative_entropy(policy, reference) + policy @ kl
        value = policy @ value
        soft = value if np.isinf(beta) else value - beta * kl
    return value[start], kl[start]


def _best_policy(reference: np.ndarray, soft: np.ndarray, beta: float) -> np.ndarray:
    best = np.where(reference > 0, soft, -np.inf).max(axis=1, keepdims=True)
    weights = reference * np.exp(np.minimum(soft - best, 0.0) / beta)
    return weights / weights.sum(axis=1, keepdims=True)


def _relative_entropy(policy: np.ndarray, reference: np.ndarray) -> np.ndarray:
    is_used = policy > 0
    ratio = np.divide(policy, reference, where=is_used, out=np.ones_like(policy))
    return (policy * np.log(ratio)).sum(axis=1)
