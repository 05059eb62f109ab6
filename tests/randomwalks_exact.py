"""RandomWalks solved exactly: the best mean optimality for each KL from a reference policy.

Of a Markov walk p, by soft value iteration (the closed form of KL-regularised control):

    V_0(i) = 0
    V_t(i) = beta log sum_j p(j | i) exp(Q_t(j) / beta)
    pi_t(j | i) = p(j | i) exp((Q_t(j) - V_t(i)) / beta)

where t moves are left and Q_t(j) is the score if j is the goal, else V_{t-1}(j).

Of any policy that writes letters, which may remember the whole walk: what counts is how probable each score is from
each start.  The best policy at penalty beta weighs every way to a score by exp(score / beta), whatever the way, so the
frontier follows from those probabilities alone:

    scores 0: .5   7/8: .3   1: .2     beta 1  ->  (.5, .3 e^.875, .2 e^1) / 1.7633 = (.2836, .4081, .3083)

Walks that are illegal, that end early or that come too late score 0 and are one outcome; only legal walks that can
still arrive are followed.  No policy lies above the curve of (KL, value) that beta traces; beta is the curve's slope.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from examples.randomwalks.graph import GOAL, MAX_NODES, NODES, Task

NextLetters = Callable[[Sequence[str]], np.ndarray]
"""Takes walks of one length, as letters; returns [walks, >= N]: how probable each letter of NODES comes next.

Further columns (the end, padding) are what is missing to 1; they may be left out.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A point of the frontier: means over the starts that can reach the goal."""

    value: float
    kl: float  # nats per walk


@dataclass(frozen=True, slots=True, kw_only=True)
class Slope(Point):
    """A point of the frontier with the penalty that leads there."""

    beta: float
    """d value / d KL: how much more value a bit more KL could buy; 0 where the best value is reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """How probable each score is under a reference policy, from each start of a task."""

    probabilities: np.ndarray
    """[starts, M]; rows add up to 1."""
    values: np.ndarray
    """[starts, M]: the optimality of arriving after 2 .. MAX_NODES nodes, the last one 0: not arriving."""


def uniform_legal_walk(task: Task) -> np.ndarray:
    """Return [N, N] transition probabilities: each legal step equally likely."""
    return task.edges / task.edges.sum(axis=1, keepdims=True)


def frontier(task: Task, beta: float, reference: np.ndarray | None = None) -> Point:
    """Return the point of the frontier at penalty `beta` (`inf`: the reference itself) of a Markov walk."""
    reference = uniform_legal_walk(task) if reference is None else reference
    points = [_solve(task, NODES.index(start), beta, reference) for start in task.starts]
    value, kl = np.mean(points, axis=0)
    return Point(value=float(value), kl=float(kl))


def outcomes(task: Task, next_letters: NextLetters) -> Outcomes:
    """Return how probable each score is when `next_letters` continues the task's starts.

    Args:
        task: The graph.
        next_letters: The reference policy; asked once for each length, about all legal walks that may still arrive.
    """
    probabilities = np.zeros((len(task.starts), MAX_NODES))
    walks = list(task.starts)
    owners, masses = np.arange(len(walks)), np.ones(len(walks))
    for num_nodes in range(2, MAX_NODES):
        if not walks:
            break
        step = np.asarray(next_letters(walks), dtype=np.float64)[:, : len(NODES)] * masses[:, None]
        nodes = np.array([NODES.index(walk[-1]) for walk in walks])
        legal = task.edges[nodes]
        np.add.at(probabilities[:, num_nodes - 2], owners, np.where(legal[:, GOAL], step[:, GOAL], 0.0))
        may_arrive = (task.shortest + num_nodes - 1 < MAX_NODES) & (np.arange(len(NODES)) != GOAL)
        rows, letters = np.nonzero(legal & may_arrive)
        walks = [walks[row] + NODES[letter] for row, letter in zip(rows, letters, strict=True)]
        owners, masses = owners[rows], step[rows, letters]
    probabilities[:, -1] = np.maximum(1.0 - probabilities.sum(axis=1), 0.0)
    return Outcomes(probabilities=probabilities, values=_values(task))


def frontier_at_beta(reference: Outcomes, beta: float) -> Slope:
    """Return the point of the frontier at penalty `beta`; `inf` is the reference itself, 0 the best there is."""
    has = reference.probabilities > 0
    best = np.where(has, reference.values, -np.inf).max(axis=1, keepdims=True)
    distance = np.minimum(reference.values - best, 0.0)
    with np.errstate(invalid="ignore"):
        tilt = np.where(distance == 0, 1.0, 0.0) if beta == 0 else np.exp(distance / beta)
    weights = reference.probabilities * tilt
    total = weights.sum(axis=1, keepdims=True)
    policy = weights / total
    used = policy > 0
    logs = np.log(np.where(used, tilt, 1.0)) - np.log(total)  # log policy / reference
    return Slope(
        value=float((policy * reference.values).sum(axis=1).mean()),
        kl=float((policy * logs).sum(axis=1).mean()),
        beta=beta,
    )


def frontier_at_kl(reference: Outcomes, kl: float) -> Slope:
    """Return the best value among all policies at most `kl` nats per walk from the reference, by bisection of log beta.

    A KL measured with a standard error of s has a frontier that is uncertain by beta s.
    """
    if kl >= frontier_at_beta(reference, 0.0).kl:
        return frontier_at_beta(reference, 0.0)
    if kl <= 0:
        return frontier_at_beta(reference, np.inf)
    low, high = np.log(1e-4), np.log(1e6)  # KL falls as beta grows
    for _ in range(80):
        middle = 0.5 * (low + high)
        is_far = frontier_at_beta(reference, float(np.exp(middle))).kl > kl
        low, high = (middle, high) if is_far else (low, middle)
    return frontier_at_beta(reference, float(np.exp(high)))


def markov_walk(transitions: np.ndarray) -> NextLetters:
    """Return the policy of [N, N] transition probabilities, which looks at the last letter only."""
    return lambda walks: transitions[[NODES.index(walk[-1]) for walk in walks]]


def language_model(directory: str, *, temperature: float = 1.0, rows: int = 1024) -> NextLetters:
    """Return the policy of a model of letters, as `concord sft` saves it, in float64.

    A model may also write its padding token, which leaves no letter in the text; such a walk is counted as not
    arriving.
    """
    import torch

    from actors.policy import load_model, load_tokenizer

    model = load_model(directory, dtype=torch.float32, device=torch.device("cpu"))
    letters = load_tokenizer(directory).convert_tokens_to_ids(list(NODES))

    def next_letters(walks: Sequence[str]) -> np.ndarray:
        ids = torch.tensor([[letters[NODES.index(letter)] for letter in walk] for walk in walks])
        with torch.inference_mode():
            logits = torch.cat([model(input_ids=some).logits[:, -1] for some in ids.split(rows)])
        return (logits.double() / temperature).softmax(-1)[:, letters].numpy()

    return next_letters


def _values(task: Task) -> np.ndarray:
    shortest = np.array([task.shortest[NODES.index(start)] for start in task.starts])
    num_nodes = np.arange(2, MAX_NODES + 2)  # the last column, MAX_NODES + 1, is not arriving
    return np.maximum(0.0, (MAX_NODES - num_nodes)[None, :] / (MAX_NODES - shortest)[:, None])


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
