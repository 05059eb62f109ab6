"""What a learner rank knows about the samples of a step: read from the batch's tables, then judged.

Samples are put into the plan's order, (group_ids, sample index), whatever order the tables came in, so nothing that is
learnt depends on arrival.  Every rank computes every sample's targets from the gathered values, so all ranks agree.

What differs from PPO's usual form: when the learner computed the old log-probs itself (in half precision, where they
are not those of the engine that sampled), each advantage is multiplied by the truncated importance weight
min(old / sampled, 2), which is the same as weighting that token's policy loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from actors.rows import PromptGroup
from actors.schema import check
from learner.advantages import gae_ragged, is_terminal, token_moments, token_rewards, whiten, with_bootstrap
from learner.batch import Microbatch, StepPlan
from learner.config import AlgorithmConfig
from reward.schema import SCORED

MAX_IMPORTANCE_WEIGHT = 2.0
"""Truncation of old / sampled probabilities (Yao et al. 2025)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt with one response of R tokens."""

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    logprobs: torch.Tensor
    """[R] float32, recorded when the tokens were sampled."""
    ref_logprobs: torch.Tensor | None
    """[R] float32."""
    policy_versions: torch.Tensor
    """[R] int32."""
    loss_mask: torch.Tensor
    """[R] bool."""
    finish_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleTargets:
    """What the loss compares one response's tokens with, all [R] float32."""

    old_logprobs: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstPass:
    """What the networks say about one sample before the first update."""

    values: torch.Tensor
    """[R + 1] float32."""
    logprobs: torch.Tensor | None
    """[R] float32, None where the recorded ones are the old ones."""


def read_samples(tables: Sequence[pa.Table], plan: StepPlan) -> list[Sample]:
    """Return the batch's samples in the plan's order.

    Raises:
        ValueError: if the tables do not hold exactly the plan's samples.
        SchemaError: if a table is not SCORED.
    """
    starts = dict(zip(plan.group_ids, plan.offsets, strict=True))
    sizes = dict(zip(plan.group_ids, plan.group_sizes, strict=True))
    found: dict[int, Sample] = {}
    for table in tables:
        check(table, SCORED, "learner step")
        rows = zip(table["group_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True)
        for row, (group_id, index) in enumerate(rows):
            if group_id not in starts or not 0 <= index < sizes[group_id]:
                raise ValueError(f"a sample must be in the step's plan, got sample {index} of group {group_id!r}")
            if starts[group_id] + index in found:
                raise ValueError(f"a sample must come once, got sample {index} of group {group_id!r} again")
            found[starts[group_id] + index] = _read_sample(table, row, f"group {group_id!r}, sample {index}")
    if len(found) != sum(plan.group_sizes):
        raise ValueError(
            f"the tables must hold all {sum(plan.group_sizes)} samples of step {plan.step}, got {len(found)}"
        )
    return [found[index] for index in range(len(found))]


def sample_indices(microbatch: Microbatch, plan: StepPlan) -> list[int]:
    """Return where a micro-batch's samples stand in the plan's order, in the order of its row's responses."""
    offsets = plan.offsets  # computed anew at each access
    return [offsets[piece.group] + sample for piece in microbatch for sample in piece.samples]


def prompt_groups(microbatch: Microbatch, samples: Sequence[Sample], plan: StepPlan) -> list[PromptGroup]:
    """Return a micro-batch's pieces as prompts with responses."""
    offsets = plan.offsets
    groups = []
    for piece in microbatch:
        members = [samples[offsets[piece.group] + index] for index in piece.samples]
        responses = [member.response_ids for member in members]
        groups.append(PromptGroup(prompt_ids=members[0].prompt_ids, responses=responses))
    return groups


def judge(
    samples: Sequence[Sample], first_pass: Sequence[FirstPass], plan: StepPlan, algorithm: AlgorithmConfig
) -> tuple[list[SampleTargets], dict[str, float]]:
    """Return each sample's targets, and the metrics that describe them.

    Rewards (score and KL penalty), values with the right end, GAE, whitening over all loss tokens of the batch.
    """
    old = [s.logprobs if p.logprobs is None else p.logprobs for s, p in zip(samples, first_pass, strict=True)]
    rewards = [
        _rewards(sample, logprobs, float(score), plan.kl_coef)
        for sample, logprobs, score in zip(samples, old, plan.scores, strict=True)
    ]
    values = [
        with_bootstrap(
            p.values, is_terminal=is_terminal(s.finish_reason, missing_eos_penalty=algorithm.missing_eos_penalty)
        )
        for s, p in zip(samples, first_pass, strict=True)
    ]
    advantages = gae_ragged(rewards, values, gamma=algorithm.gamma, gae_lambda=algorithm.gae_lambda)
    returns = [a + v[:-1] for a, v in zip(advantages, values, strict=True)]
    mask = torch.cat([sample.loss_mask for sample in samples])
    moments = token_moments(torch.cat(advantages), mask)
    metrics = {
        "advantage_mean": moments.mean,
        "advantage_std": moments.variance**0.5,
        "return_mean": token_moments(torch.cat(returns), mask).mean,
        "value_explained_variance": _explained_variance(values, returns, mask),
    }
    if algorithm.whiten_advantages:
        advantages = [whiten(a, moments.mean, moments.variance) for a in advantages]
    targets = [
        SampleTargets(old_logprobs=o, old_values=v[:-1], advantages=_weighted(a, o, s), returns=r)
        for s, o, v, a, r in zip(samples, old, values, advantages, returns, strict=True)
    ]
    return targets, metrics


def _read_sample(table: pa.Table, row: int, where: str) -> Sample:
    response_ids = _array(table, "response_ids", row)
    if not response_ids.size:
        raise ValueError(f"a response must have at least one token, got none ({where}); quarantine such a sample")
    if table["token_scores"][row].is_valid:
        raise ValueError(f"token_scores must be null with algorithm ppo, got some ({where}); return sequence scores")
    has_reference = table["ref_logprobs"][row].is_valid
    sample = Sample(
        prompt_ids=_array(table, "prompt_ids", row),
        response_ids=response_ids,
        logprobs=_tensor(table, "logprobs", row),
        ref_logprobs=_tensor(table, "ref_logprobs", row) if has_reference else None,
        policy_versions=_tensor(table, "policy_versions", row),
        loss_mask=_tensor(table, "loss_mask", row),
        finish_reason=table["finish_reason"][row].as_py(),
    )
    for name in ("logprobs", "ref_logprobs", "policy_versions", "loss_mask"):
        column = getattr(sample, name)
        if column is not None and column.shape[0] != response_ids.size:
            raise ValueError(f"{name} must have {response_ids.size} entries, got {column.shape[0]} ({where})")
    return sample


def _array(table: pa.Table, name: str, row: int) -> np.ndarray:
    return table[name][row].values.to_numpy(zero_copy_only=False)


def _tensor(table: pa.Table, name: str, row: int) -> torch.Tensor:
    return torch.from_numpy(_array(table, name, row).copy())  # Arrow's memory is read-only


def _rewards(sample: Sample, logprobs: torch.Tensor, score: float, kl_coef: float) -> torch.Tensor:
    """Return [R] rewards; tokens that the policy did not choose pay no KL penalty."""
    reference = sample.ref_logprobs
    chosen = logprobs if reference is None else torch.where(sample.loss_mask, logprobs, reference)
    return token_rewards(score, chosen, reference, kl_coef)


def _weighted(advantages: torch.Tensor, old_logprobs: torch.Tensor, sample: Sample) -> torch.Tensor:
    """Return advantages times the truncated importance weight, which is 1 where old and recorded log-probs agree."""
    return advantages * (old_logprobs - sample.logprobs).exp().clamp(max=MAX_IMPORTANCE_WEIGHT)


def _explained_variance(values: Sequence[torch.Tensor], returns: Sequence[torch.Tensor], mask: torch.Tensor) -> float:
    """Return 1 - Var(return - value) / Var(return) over loss tokens; 0 where returns do not vary."""
    flat = torch.cat(list(returns))
    residual = flat - torch.cat([v[:-1] for v in values])
    variance = token_moments(flat, mask).variance
    return 1.0 - token_moments(residual, mask).variance / variance if variance > 0 else 0.0
