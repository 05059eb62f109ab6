"""What a step's samples are trained towards: rewards, advantages, value targets, off-policy weights.

Every rank computes every sample's targets from the gathered first pass, so all ranks agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from learner.advantages import is_terminal, token_moments, token_rewards, whiten, with_bootstrap
from learner.algorithm_config import AlgorithmConfig
from learner.algorithms import estimator_of
from learner.batch import StepPlan
from learner.credit import dense_rewards
from learner.estimators import Advantages, Experience
from learner.objective import Targets
from learner.off_policy import importance_weights
from learner.samples import Sample
from reward.credit_config import CreditConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstPass:
    """What the networks say about one sample before the first update."""

    values: torch.Tensor
    """[R + 1] float32, 0 without a value function."""
    logprobs: torch.Tensor | None = None
    """[R] float32, None where the recorded ones are the old ones."""
    ref_logprobs: torch.Tensor | None = None
    """[R] float32 of a reference that lives with the learner, None where the recorded ones are the reference's."""


def _with_first_pass(sample: Sample, first_pass: FirstPass) -> Sample:
    """Return the sample with the reference that counts in this step."""
    return sample if first_pass.ref_logprobs is None else replace(sample, ref_logprobs=first_pass.ref_logprobs)


def judge(
    samples: Sequence[Sample],
    first_pass: Sequence[FirstPass],
    plan: StepPlan,
    algorithm: AlgorithmConfig,
    credit: CreditConfig | None = None,
) -> tuple[list[Targets], dict[str, float]]:
    """Return each sample's targets, and the metrics that describe them.

    Rewards (score, and KL penalty where it is part of them), values with the right end, the algorithm's advantages,
    whitening over all loss tokens of the batch, off-policy weights.
    """
    old = [s.logprobs if p.logprobs is None else p.logprobs for s, p in zip(samples, first_pass, strict=True)]
    samples = [_with_first_pass(s, p) for s, p in zip(samples, first_pass, strict=True)]
    experience = _experience(samples, old, [part.values for part in first_pass], plan, algorithm, credit)
    values = experience.values
    estimated = estimator_of(algorithm)(experience, algorithm)
    _check_returns(estimated, algorithm)
    advantages = estimated.advantages
    mask = torch.cat([sample.loss_mask for sample in samples])
    moments = token_moments(torch.cat(list(advantages)), mask)
    metrics = {"advantage_mean": moments.mean, "advantage_std": moments.variance**0.5}
    returns = estimated.returns
    if returns is None:
        returns = [torch.zeros_like(row) for row in advantages]
    else:
        metrics["return_mean"] = token_moments(torch.cat(list(returns)), mask).mean
        metrics["value_explained_variance"] = _explained_variance(values, returns, mask)
    if any(p.ref_logprobs is not None for p in first_pass):
        metrics["reference_kl"] = _reference_kl(samples, old)
    if algorithm.whiten_advantages:
        advantages = [whiten(a, moments.mean, moments.variance) for a in advantages]
    importance = _importance(samples, old, mask, algorithm)
    targets = [
        Targets(
            old_logprobs=o,
            old_values=v[:-1],
            advantages=a,
            returns=r,
            ref_logprobs=torch.zeros_like(o) if s.ref_logprobs is None else s.ref_logprobs,
            importance=i,
            loss_mask=s.loss_mask,
        )
        for s, o, v, a, r, i in zip(samples, old, values, advantages, returns, importance, strict=True)
    ]
    return targets, metrics


def _experience(
    samples: Sequence[Sample],
    old: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    plan: StepPlan,
    algorithm: AlgorithmConfig,
    credit: CreditConfig | None,
) -> Experience:
    ends = [is_terminal(s.finish_reason, missing_eos_penalty=algorithm.missing_eos_penalty) for s in samples]
    kl_coef = plan.kl_coef if algorithm.kl.placement == "reward" else 0.0
    rewards = [
        _rewards(sample, logprobs, float(score), kl_coef)
        if credit is None
        else _rewards(sample, logprobs, 0.0, kl_coef) + _credited(sample, float(score), credit, algorithm, end)
        for sample, logprobs, score, end in zip(samples, old, plan.scores, ends, strict=True)
    ]
    return Experience(
        group_sizes=plan.group_sizes,
        rewards=rewards,
        values=[with_bootstrap(v, is_terminal=end) for v, end in zip(values, ends, strict=True)],
        log_ratios=[torch.where(s.loss_mask, o - s.logprobs, 0.0) for o, s in zip(old, samples, strict=True)],
        baseline=plan.baseline,
    )


def _check_returns(estimated: Advantages, algorithm: AlgorithmConfig) -> None:
    if estimated.returns is None and algorithm.needs_values:
        raise ValueError(
            f"returns must be given by an advantage with algorithm.value_coef {algorithm.value_coef}, got none from "
            f"{algorithm.advantage}; return the value function's targets, or set value_coef to 0"
        )
    if estimated.returns is not None and not algorithm.needs_values:
        raise ValueError(
            f"returns must be left out by an advantage of algorithm {algorithm.name}, which trains no value function, "
            f"got some from {algorithm.advantage}; name a preset that does, for instance ppo"
        )


def _rewards(sample: Sample, logprobs: torch.Tensor, score: float, kl_coef: float) -> torch.Tensor:
    """Return [R] rewards; tokens that the policy did not choose pay no KL penalty."""
    reference = sample.ref_logprobs
    chosen = logprobs if reference is None else torch.where(sample.loss_mask, logprobs, reference)
    return token_rewards(score, chosen, reference, kl_coef)


def _credited(
    sample: Sample, score: float, credit: CreditConfig, algorithm: AlgorithmConfig, is_terminal: bool
) -> torch.Tensor:
    if sample.token_scores is None:
        raise ValueError("token_scores must be given with reward.credit, got none; judge the rollouts again with it")
    # Without values nothing takes back what is left of the potential where a response was cut off.
    ended = is_terminal or not algorithm.needs_values
    return dense_rewards(score, sample.token_scores, credit, gamma=algorithm.gamma, is_terminal=ended)


def _importance(
    samples: Sequence[Sample], old: Sequence[torch.Tensor], mask: torch.Tensor, algorithm: AlgorithmConfig
) -> tuple[torch.Tensor, ...]:
    settings, lengths = algorithm.off_policy, [row.shape[0] for row in old]
    weights = importance_weights(
        torch.cat(list(old)),
        torch.cat([sample.logprobs for sample in samples]),
        lengths,
        mask,
        weight=settings.weight,
        max_weight=settings.max_weight,
        mask=settings.mask,
        mask_range=settings.mask_range,
    )
    return weights.split(lengths)


def _reference_kl(samples: Sequence[Sample], old: Sequence[torch.Tensor]) -> float:
    """Return nats per sequence, over the policy's own tokens."""
    total = 0.0
    for sample, logprobs in zip(samples, old, strict=True):
        assert sample.ref_logprobs is not None, "the ranks' reference has looked at every sample"
        total += float((logprobs - sample.ref_logprobs)[sample.loss_mask].double().sum())
    return total / len(samples)


def _explained_variance(values: Sequence[torch.Tensor], returns: Sequence[torch.Tensor], mask: torch.Tensor) -> float:
    """Return 1 - Var(return - value) / Var(return) over loss tokens; 0 where returns do not vary."""
    flat = torch.cat(list(returns))
    residual = flat - torch.cat([v[:-1] for v in values])
    variance = token_moments(flat, mask).variance
    return 1.0 - token_moments(residual, mask).variance / variance if variance > 0 else 0.0
