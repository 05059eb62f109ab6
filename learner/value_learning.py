"""Losses of learning values from logged text: token Q-learning and ILQL, as pure functions of numbers per token.

A trajectory's A_i learnt tokens are its actions; the state before each and the one after the last make A_i + 1 states.
Trajectories lie one behind the other: A = sum A_i actions, A + N states.

What differs from the papers:

* ILQL (Snell et al. 2022): the paper has three transformers, a policy of the data, values, and a slow copy of the
  latter; here, as in trlx, one trunk bears the policy and all heads, and only the Q heads have a slow copy.
* awac_beta 0 makes its policy loss plain behaviour cloning; above 0 its weights are bounded.
* Q-learning has ILQL's twin Q and, with cql_coef above 0, its conservative term; both off is Watkins's rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

_MAX_WEIGHT = 20.0
"""Bound of the advantage-weighted policy loss's weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueInputs:
    """What the networks say about N trajectories of together A actions, and what the data says."""

    q: torch.Tensor
    """[2, A], Q(s, a) of both heads at the data's tokens."""
    q_nll: torch.Tensor
    """[2, A], -log softmax(Q(s, .))[a] of both heads."""
    target_q: torch.Tensor
    """[A], the smaller target Q(s, a); no gradient."""
    values: torch.Tensor
    """[A + N], V of each state; for Q-learning max_a of the smaller target Q."""
    logprobs: torch.Tensor
    """[A], log pi(a|s)."""
    scores: torch.Tensor
    """[N], the reward at each trajectory's last action."""
    is_terminal: torch.Tensor
    """[N] bool; a trajectory that was cut off goes on with the value of its last state."""
    lengths: tuple[int, ...]
    """Actions of each trajectory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLoss:
    """The loss of each action and its parts, [A]."""

    loss: torch.Tensor
    q_loss: torch.Tensor
    v_loss: torch.Tensor
    cql_loss: torch.Tensor
    bc_loss: torch.Tensor
    """Not weighted by advantages."""


def ilql_loss(
    inputs: ValueInputs, *, tau: float, gamma: float, cql_coef: float, bc_coef: float, awac_beta: float = 0.0
) -> ValueLoss:
    """Return L_Q + L_V + cql_coef L_CQL + bc_coef L_AWAC for each action.

    L_V = L2^tau(min Qhat(s, a) - V(s)); L_Q = sum over both heads of (r + gamma V(s') - Q(s, a))^2; L_AWAC =
    -exp(awac_beta (min Qhat(s, a) - V(s))) log pi(a|s).  No gradient goes through a target.

    Source: Snell et al. 2022, arXiv 2206.11871, L_{Q,V}; the weighted policy loss is Nair et al. 2020 (AWAC,
    arXiv 2006.09359).
    """
    states = states_before(inputs.values, inputs.lengths)
    errors = inputs.target_q.detach() - states
    v_loss = expectile_loss(errors, tau)
    weights = (awac_beta * errors.detach()).exp().clamp(max=_MAX_WEIGHT)
    return _combined(inputs, v_loss, weights, gamma=gamma, cql_coef=cql_coef, bc_coef=bc_coef)


def q_learning_loss(inputs: ValueInputs, *, gamma: float, cql_coef: float, bc_coef: float) -> ValueLoss:
    """Return L_Q + cql_coef L_CQL + bc_coef L_BC for each action, y = r + gamma max_a Qhat(s', a), r where text ends.

    Source: Watkins 1989; target network and twin Q as in Mnih et al. 2015 and Fujimoto et al. 2018.
    """
    none = torch.zeros_like(inputs.logprobs)
    return _combined(inputs, none, torch.ones_like(none), gamma=gamma, cql_coef=cql_coef, bc_coef=bc_coef)


def expectile_loss(errors: torch.Tensor, tau: float) -> torch.Tensor:
    """Return |tau - 1(u < 0)| u^2 of each error u = target - estimate; tau 0.5 is half the squared error.

    Source: Kostrikov et al. 2021 (IQL, arXiv 2110.06169), L_2^tau; Newey and Powell 1987.
    """
    return torch.where(errors < 0, 1 - tau, tau) * errors.square()


def bellman_targets(
    values: torch.Tensor,
    scores: torch.Tensor,
    is_terminal: torch.Tensor,
    lengths: Sequence[int],
    *,
    gamma: float,
) -> torch.Tensor:
    """Return r + gamma V(s') of each action, [A], without gradient: r alone where the text ends.

    Two actions, values 1, 2, 3 of their states, score 10, gamma 0.5: 0 + 0.5 * 2 = 1 and, terminal, 10; cut off there,
    10 + 0.5 * 3 = 11.5.

    Args:
        values: [A + N] of each state.
        scores: [N], the reward of each trajectory's last action; all others have 0.
        is_terminal: [N] bool.
        lengths: actions of each trajectory.
        gamma: discount.
    """
    last = torch.as_tensor(lengths, device=values.device).cumsum(0) - 1
    targets = gamma * _states_after(values.detach(), lengths)
    targets[last] = torch.where(is_terminal, 0.0, targets[last]) + scores
    return targets


def states_before(values: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return the values of the states before each action, [A], of those of all states, [A + N]."""
    return torch.cat([part[:-1] for part in values.split([length + 1 for length in lengths])])


def polyak_update(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], share: float) -> None:
    """Move each target by `share` of its distance to its source, in place.

    Source: Lillicrap et al. 2015 (arXiv 1509.02971), Algorithm 1.
    """
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.lerp_(source.to(target.dtype), share)


def token_nll(q: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Return -log softmax(Q)[a], [B], of Q [B, V]: ILQL's conservative term, small where Q prefers the data's tokens.

    Source: Snell et al. 2022, L_CQL, after Kumar et al. 2020 (CQL, arXiv 2006.04779).
    """
    return nn.functional.cross_entropy(q, actions, reduction="none")


def _states_after(values: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    return torch.cat([part[1:] for part in values.split([length + 1 for length in lengths])])


def _combined(
    inputs: ValueInputs,
    v_loss: torch.Tensor,
    weights: torch.Tensor,
    *,
    gamma: float,
    cql_coef: float,
    bc_coef: float,
) -> ValueLoss:
    targets = bellman_targets(inputs.values, inputs.scores, inputs.is_terminal, inputs.lengths, gamma=gamma)
    q_loss = (targets - inputs.q).square().sum(0)
    cql_loss = inputs.q_nll.sum(0)
    bc_loss = -inputs.logprobs
    loss = q_loss + v_loss + cql_coef * cql_loss + bc_coef * weights * bc_loss
    return ValueLoss(loss=loss, q_loss=q_loss, v_loss=v_loss, cql_loss=cql_loss, bc_loss=bc_loss)
