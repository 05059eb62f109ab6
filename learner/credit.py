"""Dense credit: one score spread over a response's tokens.  Pure functions of tensors.

    score 6, shares (.5, .25, .25)          mix 1      (3, 1.5, 1.5)
                                            mix .5     (1.5, .75, 3.75)
    score 6, potentials (1, 3, 2),          ended      (1, 2, -3 + 6)    nothing is left of Phi
    gamma 1, coef 1                         cut off    (1, 2, -1 + 6)    Phi = 2 is left, for V(s_R) to take back

Potentials leave the ranking of policies as it is, whatever they are.  Shares do so with gamma 1, where every response
keeps its return; with a smaller gamma, what is paid earlier is worth more.

What differs from the papers:
- ABC's shares are of the reward model's tokens, these are of the policy's.
- Phi(prompt) is 0 rather than the judge's score of an empty response: a constant per prompt, which ranks nothing.
- RED (2411.08302), r_t = RM(y_<=t) - RM(y_<t) without a score at the end, is `potential_rewards` with coef 1 and
  gamma 1 of the judge that gives the score, but for that constant on the first token: on the last token, the score and
  the Phi that is dropped make RM(y) - RM(y_<R).  So it is not built a second time.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from reward.credit_config import CreditConfig

_SUM_TOLERANCE = 1e-3


def dense_rewards(
    score: float,
    token_scores: torch.Tensor | Sequence[float],
    credit: "CreditConfig",
    *,
    gamma: float,
    is_terminal: bool,
) -> torch.Tensor:
    """Return one response's rewards, without the KL penalty.

    Args:
        score: The composed score of the response.
        token_scores: [R], what SCORED holds: shares with kind attention, potentials with kind potential.
        credit: Which of the two, and how strongly.
        gamma: Discount of the algorithm.
        is_terminal: Whether the response ended its episode, see `learner.advantages.is_terminal`.

    Returns:
        [R] float32.

    Raises:
        ValueError: if there is no token, or the token scores are not of that kind.
    """
    values = torch.as_tensor(token_scores, dtype=torch.float32)
    if credit.kind == "attention":
        return attention_rewards(score, values, mix=credit.coef)
    return potential_rewards(score, values, coef=credit.coef, gamma=gamma, is_terminal=is_terminal)


def attention_rewards(score: float, shares: torch.Tensor, mix: float) -> torch.Tensor:
    """Return r_t = score (mix share_t + (1 - mix) [t is last]), which sums to the score.

    Args:
        score: The composed score of the response.
        shares: [R], at least 0, sum 1: the reward model's attention on each token.
        mix: Part of the score that is spread, 0 to 1.

    Returns:
        [R], of the dtype of `shares`.

    Raises:
        ValueError: if the shares are none.

    Source:
        Chan et al. 2024 (2402.00782), Attention Based Credit.
    """
    _check_tokens(shares, "shares")
    if not (bool((shares >= 0).all()) and abs(float(shares.sum()) - 1.0) < _SUM_TOLERANCE):
        raise ValueError(
            f"shares must be at least 0 and sum to 1, got {shares.tolist()!s:.80}; judge with credit of kind attention"
        )
    rewards = score * mix * shares
    rewards[-1] += score * (1.0 - mix)
    return rewards


def potential_rewards(
    score: float, potentials: torch.Tensor, *, coef: float, gamma: float, is_terminal: bool
) -> torch.Tensor:
    """Return r_t = coef (gamma Phi(s_{t+1}) - Phi(s_t)) + score [t is last]; Phi is 0 before the first token.

    Phi is 0 after the last token as well where the response ended.  Where it was cut off Phi stays, and what a critic
    expects of the state there is less by as much: V'(s) = V(s) - coef Phi(s).  Discounted, the shaping sums to 0 or to
    what is left.

    Args:
        score: The composed score of the response.
        potentials: [R], Phi(s_1) .. Phi(s_R): of the response's prefixes with 1 .. R tokens.
        coef: Factor of the potentials.
        gamma: Discount.
        is_terminal: Whether the response ended its episode.

    Returns:
        [R], of the dtype of `potentials`.

    Raises:
        ValueError: if there is no token, or a potential is not finite.

    Source:
        Ng, Harada, Russell 1999, "Policy invariance under reward transformations", Theorem 1.
    """
    _check_tokens(potentials, "potentials")
    after = potentials.clone()
    if is_terminal:
        after[-1] = 0.0
    before = torch.cat([torch.zeros_like(potentials[:1]), potentials[:-1]])
    rewards = coef * (gamma * after - before)
    rewards[-1] += score
    return rewards


def _check_tokens(values: torch.Tensor, what: str) -> None:
    if values.ndim != 1 or values.shape[0] == 0:
        raise ValueError(f"{what} must be one number for each token, got shape {tuple(values.shape)}")
    if not bool(values.isfinite().all()):
        raise ValueError(f"{what} must be finite, got {values.tolist()!s:.80}; mend the judge")
