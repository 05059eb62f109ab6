"""Losses of value learning: numbers worked by hand, gradients, and a token game solved exactly."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from learner import value_learning
from learner.value_learning import (
    ValueInputs,
    bellman_targets,
    expectile_loss,
    ilql_loss,
    polyak_update,
    q_learning_loss,
    token_nll,
)
from tests.checks import Case, Check, with_twins

WIDE = torch.float64


def tensor(values, **settings):
    return torch.tensor(values, dtype=WIDE, **settings)


# --- by hand -----------------------------------------------------------------------------------------------------


def test_expectile_loss_by_hand():
    # tau 0.8: above the estimate 0.8 u^2, below it 0.2 u^2.
    assert expectile_loss(tensor([2.0, -1.0, 0.0]), 0.8).tolist() == pytest.approx([3.2, 0.2, 0.0])
    errors = tensor([0.3, -1.7])
    assert torch.equal(expectile_loss(errors, 0.5), 0.5 * errors.square())


def test_bellman_targets_by_hand():
    # Two actions, states worth 1, 2, 3; one action, states worth 4, 5.
    values, scores = tensor([1.0, 2.0, 3.0, 4.0, 5.0]), tensor([10.0, 7.0])
    targets = functools.partial(bellman_targets, values, scores, lengths=(2, 1), gamma=0.5)
    assert targets(torch.tensor([True, True])).tolist() == [1.0, 10.0, 7.0]
    assert targets(torch.tensor([False, True])).tolist() == [1.0, 11.5, 7.0]
    assert targets(torch.tensor([True, False])).tolist() == [1.0, 10.0, 9.5]


def test_token_nll_is_cross_entropy():
    assert token_nll(tensor([[0.0, np.log(3.0)]]), torch.tensor([1])).item() == pytest.approx(np.log(4 / 3))


def test_polyak_update_by_hand():
    target, source = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0], requires_grad=True)
    polyak_update([target], [source], 0.25)
    assert target.tolist() == [1.5, 1.0]
    polyak_update([target], [source], 1.0)
    assert target.tolist() == source.tolist()


def one_trajectory(**settings) -> ValueInputs:
    """Two actions, terminal, score 1."""
    values = {
        "q": tensor([[0.5, 0.0], [0.25, 2.0]], requires_grad=True),
        "q_nll": tensor([[0.1, 0.2], [0.3, 0.4]], requires_grad=True),
        "target_q": tensor([0.5, 0.2], requires_grad=True),
        "values": tensor([0.0, 0.4, 9.0], requires_grad=True),
        "logprobs": tensor([-1.0, -2.0], requires_grad=True),
        "scores": tensor([1.0]),
        "is_terminal": torch.tensor([True]),
        "lengths": (2,),
    }
    return ValueInputs(**values | settings)


def test_ilql_loss_by_hand():
    loss = ilql_loss(one_trajectory(), tau=0.8, gamma=0.5, cql_coef=0.1, bc_coef=2.0)
    # Targets 0.5 * 0.4 = 0.2 and 1: (0.3^2 + 0.05^2), (1^2 + 1^2).
    assert loss.q_loss.tolist() == pytest.approx([0.0925, 2.0])
    # Errors 0.5 - 0 above and 0.2 - 0.4 below.
    assert loss.v_loss.tolist() == pytest.approx([0.8 * 0.25, 0.2 * 0.04])
    assert loss.loss.tolist() == pytest.approx([0.0925 + 0.2 + 0.04 + 2.0, 2.0 + 0.008 + 0.06 + 4.0])
    weighted = ilql_loss(one_trajectory(), tau=0.8, gamma=0.5, cql_coef=0.0, bc_coef=1.0, awac_beta=10.0)
    # exp(10 * 0.5) is more than 20, exp(10 * -0.2) is not.
    rest = weighted.q_loss + weighted.v_loss
    assert (weighted.loss - rest).tolist() == pytest.approx([20.0 * 1.0, np.exp(-2.0) * 2.0])


def test_q_learning_loss_by_hand():
    loss = q_learning_loss(one_trajectory(), gamma=0.5, cql_coef=0.1, bc_coef=2.0)
    assert loss.q_loss.tolist() == pytest.approx([0.0925, 2.0])
    assert loss.v_loss.tolist() == [0.0, 0.0]
    assert loss.loss.tolist() == pytest.approx([0.0925 + 0.04 + 2.0, 2.0 + 0.06 + 4.0])


def no_stop(loss_function, inputs, **settings):
    """Planted bug: the target keeps its gradient."""
    detach = torch.Tensor.detach
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "detach", lambda tensor: tensor)
        loss = loss_function(inputs, **settings)
    assert torch.Tensor.detach is detach
    return loss


@pytest.mark.parametrize("is_twin", [False, True])
def test_no_gradient_goes_through_a_target(is_twin):
    inputs = one_trajectory()
    ilql = functools.partial(no_stop, ilql_loss) if is_twin else ilql_loss
    ilql(inputs, tau=0.8, gamma=0.5, cql_coef=0.1, bc_coef=2.0, awac_beta=1.0).loss.sum().backward()
    # V learns from its own loss alone: -2 tau u above, -2 (1 - tau) u below; nothing reaches the state after the end.
    expected = [-2 * 0.8 * 0.5, 2 * 0.2 * 0.2, 0.0]
    is_right = inputs.target_q.grad is None and inputs.values.grad.tolist() == pytest.approx(expected)
    assert is_right == (not is_twin)


def test_gradients_equal_finite_differences():
    """C1 for these losses; V's own gradient stands above: a difference in V moves the targets, which autograd skips."""
    given = one_trajectory(values=tensor([0.0, 0.4, 9.0]))

    def loss(q, q_nll, logprobs):
        inputs = dataclasses.replace(given, q=q, q_nll=q_nll, logprobs=logprobs)
        return ilql_loss(inputs, tau=0.8, gamma=0.5, cql_coef=0.1, bc_coef=2.0, awac_beta=0.5).loss

    assert torch.autograd.gradcheck(loss, (given.q, given.q_nll, given.logprobs))


# --- a token game, solved -----------------------------------------------------------------------------------------
#
# States: "" (0), "a" (1), "b" (2).  From "" the tokens a, b go to those states, c ends with 0.  In "a" the tokens
# score 1, 3, and c is never seen in the data (it would score 9).  In "b" they score 0, 2, 4.

GAMMA = 0.9
SCORES = {1: [1.0, 3.0, 9.0], 2: [0.0, 2.0, 4.0]}
BEHAVIOUR = {0: [0.5, 0.3, 0.2], 1: [0.75, 0.25, 0.0], 2: [0.5, 0.25, 0.25]}


def every_path():
    """Return (states, actions, score, probability) of each text that the behaviour policy writes."""
    paths = [([0], [2], 0.0, BEHAVIOUR[0][2])]
    for first in (0, 1):
        state = first + 1
        for second, chance in enumerate(BEHAVIOUR[state]):
            if chance:
                path = ([0, state], [first, second], SCORES[state][second], BEHAVIOUR[0][first] * chance)
                paths.append(path)
    return paths


class Tables:
    """A tabular network: one number per state and token."""

    def __init__(self, *, is_ilql: bool) -> None:
        self.q = torch.zeros(2, 3, 3, dtype=WIDE, requires_grad=True)
        self.target_q = torch.zeros(2, 3, 3, dtype=WIDE)
        self.v = torch.zeros(3, dtype=WIDE, requires_grad=True) if is_ilql else None
        paths = every_path()
        self.states = torch.tensor([state for states, *_ in paths for state in states])
        self.actions = torch.tensor([action for _, actions, *_ in paths for action in actions])
        # One more state per text, the one after its end: its value is that of state 0 and must not matter.
        self.with_end = torch.tensor([state for states, *_ in paths for state in (*states, 0)])
        self.scores = tensor([score for *_, score, _ in paths])
        self.lengths = tuple(len(actions) for _, actions, *_ in paths)
        self.weights = torch.cat([tensor([chance] * len(actions)) for _, actions, _, chance in paths])

    def inputs(self) -> ValueInputs:
        target = self.target_q.amin(0)
        values = target.amax(-1) if self.v is None else self.v
        q = self.q[:, self.states]
        actions = self.actions.expand(2, -1)
        return ValueInputs(
            q=q.gather(2, actions[..., None])[..., 0],
            q_nll=torch.stack([token_nll(one, self.actions) for one in q]),
            target_q=target[self.states, self.actions],
            values=values[self.with_end],
            logprobs=torch.zeros(len(self.states), dtype=WIDE),
            scores=self.scores,
            is_terminal=torch.ones(len(self.lengths), dtype=torch.bool),
            lengths=self.lengths,
        )

    def train(self, loss_function, *, num_updates: int = 150) -> "Tables":
        """Descend on the expected loss, with steps that grow small; the target follows."""
        optimizer = torch.optim.Adam([self.q] if self.v is None else [self.q, self.v], betas=(0.5, 0.9))
        for update in range(num_updates):
            optimizer.param_groups[0]["lr"] = 0.4 * (1 - update / num_updates) ** 2
            optimizer.zero_grad()
            (loss_function(self.inputs()).loss * self.weights).sum().backward()
            optimizer.step()
            polyak_update([self.target_q], [self.q], 0.5)
        return self


def value_iteration() -> np.ndarray:
    """Return Q* [3, 3] over the tokens that the data has; NaN elsewhere."""
    q = np.full((3, 3), np.nan)
    for state, scores in SCORES.items():
        q[state] = np.where(np.array(BEHAVIOUR[state]) > 0, scores, np.nan)
    q[0] = [GAMMA * np.nanmax(q[1]), GAMMA * np.nanmax(q[2]), 0.0]
    return q


def expectile(values, chances, tau: float) -> float:
    """Return the number m where tau E[(x - m)+] = (1 - tau) E[(m - x)+], by bisection."""
    values, chances = np.array(values), np.array(chances)
    low, high = values.min(), values.max()
    for _ in range(100):
        middle = (low + high) / 2
        above = (chances * np.maximum(values - middle, 0)).sum()
        below = (chances * np.maximum(middle - values, 0)).sum()
        low, high = (middle, high) if tau * above > (1 - tau) * below else (low, middle)
    return middle


def ilql_values(tau: float) -> np.ndarray:
    """Return V [3] of the behaviour policy's expectiles, backwards."""
    v = np.zeros(3)
    for state in (1, 2):
        v[state] = expectile(SCORES[state], BEHAVIOUR[state], tau)
    v[0] = expectile([GAMMA * v[1], GAMMA * v[2], 0.0], BEHAVIOUR[0], tau)
    return v


def solves_value_iteration(loss_function) -> None:
    learned, exact = Tables(is_ilql=False).train(loss_function).q.detach().numpy(), value_iteration()
    is_seen = ~np.isnan(exact)
    assert all(np.abs(one - exact)[is_seen].max() < 1e-5 for one in learned)


Q_LEARNING = functools.partial(q_learning_loss, gamma=GAMMA, cql_coef=0.0, bc_coef=1.0)


def bootstraps_past_the_end(inputs):
    return Q_LEARNING(dataclasses.replace(inputs, is_terminal=torch.zeros_like(inputs.is_terminal)))


def takes_this_state(inputs):
    """The target's value is that of the state before the action."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(value_learning, "_states_after", value_learning.states_before)
        return Q_LEARNING(inputs)


def scores_the_first_token(inputs):
    shifted = inputs.scores.roll(1)
    return Q_LEARNING(dataclasses.replace(inputs, scores=shifted))


def learned_values(tau: float, loss_function=ilql_loss) -> np.ndarray:
    loss = functools.partial(loss_function, tau=tau, gamma=GAMMA, cql_coef=0.0, bc_coef=1.0)
    return Tables(is_ilql=True).train(loss).v.detach().numpy()


def finds_expectiles(loss_function) -> None:
    for tau in (0.5, 0.8, 0.99):
        np.testing.assert_allclose(learned_values(tau, loss_function), ilql_values(tau), atol=1e-5)


def turned_expectile(inputs, *, tau, **settings):
    return ilql_loss(inputs, tau=1 - tau, **settings)


def expectile_of_the_mean(inputs, *, tau, **settings):
    return ilql_loss(inputs, tau=0.5, **settings)


CHECKS = (
    Check(
        id="C6-value-iteration",
        run=solves_value_iteration,
        part=Q_LEARNING,
        twins={
            "bootstraps-past-the-end": bootstraps_past_the_end,
            "this-state-for-the-next": takes_this_state,
            "score-on-another-text": scores_the_first_token,
        },
    ),
    Check(
        id="C6-expectiles",
        run=finds_expectiles,
        part=ilql_loss,
        twins={"turned": turned_expectile, "always-the-mean": expectile_of_the_mean},
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


def test_expectiles_go_from_the_mean_to_the_maximum_in_support():
    mean = [np.dot(SCORES[state], BEHAVIOUR[state]) for state in (1, 2)]
    np.testing.assert_allclose(ilql_values(0.5), [GAMMA * np.dot(BEHAVIOUR[0][:2], mean), *mean])
    # Not the score of 9 that the data does not have.
    np.testing.assert_allclose(ilql_values(0.9999)[1:], [3.0, 4.0], atol=2e-3)
    assert np.all(np.diff([ilql_values(tau) for tau in (0.5, 0.7, 0.9, 0.99)], axis=0) > 0)


def test_the_conservative_term_keeps_unseen_tokens_low():
    """With it the token that the data does not have is worth less than any that it has; without it nothing says so."""
    with_cql = functools.partial(q_learning_loss, gamma=GAMMA, cql_coef=0.1, bc_coef=1.0)
    free, conservative = (Tables(is_ilql=False).train(loss) for loss in (Q_LEARNING, with_cql))
    assert free.q[0, 1, 2].item() == 0.0
    assert conservative.q[0, 1, 2].item() < -0.5
