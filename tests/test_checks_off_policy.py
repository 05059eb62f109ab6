"""Samples of a stale policy, weighted, against finite sums over all sequences: no sampling, no tolerance for noise.

C8: weights without limit are unbiased; a limit or a mask loses exactly the mass it cuts off.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from learner.algorithm_config import AlgorithmConfig, KLConfig
from learner.losses import LossInputs, ppo_clip
from learner.objective import MinibatchLoss, Predictions, Targets, Weighting, minibatch_loss
from learner.off_policy import importance_weights, mismatch
from tests.checks import Case, Check, with_twins
from tests.token_mdp import World, bandit, policy_gradient, sequences, softmax, tree

GENERATOR = np.random.default_rng(0)
SCORES = GENERATOR.normal(size=(3, 3, 3))

# Three policies, of a token among five and of sequences of three: current, old, and the one that sampled.
BANDIT = bandit(np.array([1.0, -0.5, 2.0, 0.3, -1.5]))
ARM_LOGITS, ARM_OLD_LOGITS, ARM_BEHAVIOUR_LOGITS = ARM_POLICIES = tuple(GENERATOR.normal(size=(3, 1, 5)))
WRITING = tree(lambda _, tokens: float(SCORES[tokens]), num_tokens=3, max_length=3)
LOGITS, OLD_LOGITS, BEHAVIOUR_LOGITS = POLICIES = tuple(GENERATOR.normal(size=(3, WRITING.num_states, 3)))
NO_CLIP = 1e6


def correct(old_logprobs: torch.Tensor, behaviour_logprobs: torch.Tensor, length: int, **settings) -> torch.Tensor:
    """Return the shipped weights of [N, length] tokens; settings as in `algorithm.off_policy`."""
    mask = torch.ones(old_logprobs.numel(), dtype=torch.bool)
    chosen = {"weight": "none", "max_weight": None, "mask": "none", "mask_range": None, **settings}
    flat = (one.reshape(-1) for one in (old_logprobs, behaviour_logprobs))
    return importance_weights(*flat, (length,) * len(old_logprobs), mask, **chosen).view_as(old_logprobs)


def stale_step(
    world: World,
    logits: tuple[np.ndarray, np.ndarray, np.ndarray],
    weigh: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    *,
    ratio: str = "token",
) -> torch.Tensor:
    """Return minus the gradient of the expected loss on the sampling policy's sequences, [S, V].

    Args:
        world: Without discount; all its sequences are equally long.
        logits: Of the current, the old and the sampling policy.
        weigh: (old logprobs [N, T], sampling logprobs [N, T], T) -> [N, T]; the former carry a gradient where the old
            policy is the current one, as in the first update of a step.
        ratio: Of `ppo_clip`.
    """
    current, old, behaviour = (torch.from_numpy(one).clone() for one in logits)
    found = list(sequences(world, softmax(logits[2])))
    states, tokens = (torch.tensor([getattr(one, name) for one in found]) for name in ("states", "tokens"))
    logprobs = current.requires_grad_().log_softmax(-1)[states, tokens]
    old_logprobs, behaviour_logprobs = (one.log_softmax(-1)[states, tokens] for one in (old, behaviour))
    if np.array_equal(logits[0], logits[1]):
        old_logprobs = logprobs
    weights = weigh(old_logprobs, behaviour_logprobs, states.shape[1])
    scores = torch.tensor([one.score for one in found], dtype=torch.float64)
    flat = LossInputs(
        logprobs=logprobs.reshape(-1),
        old_logprobs=old_logprobs.detach().reshape(-1),
        advantages=scores.repeat_interleave(states.shape[1]),
        lengths=(states.shape[1],) * len(states),
        loss_mask=torch.ones(states.numel(), dtype=torch.bool),
    )
    loss = ppo_clip(flat, clip_range=NO_CLIP, ratio=ratio).loss.view_as(weights)
    probabilities = torch.tensor([one.probability for one in found], dtype=torch.float64)
    return -torch.autograd.grad((probabilities[:, None] * weights * loss).sum(), current)[0]


def kept_gradient(world: World, logits: np.ndarray, masses: Callable[[np.ndarray, np.ndarray], np.ndarray]):
    """Return sum over sequences y of mass(pi(y), mu(y)) * score(y) * gradient of log pi(y); pi(y) gives dJ."""
    behaviour_logits = ARM_BEHAVIOUR_LOGITS if world is BANDIT else BEHAVIOUR_LOGITS
    pairs = zip(sequences(world, softmax(logits)), sequences(world, softmax(behaviour_logits)), strict=True)
    leaf = torch.from_numpy(logits).clone().requires_grad_()
    total = leaf.new_zeros(())
    for one, sampled in pairs:
        mass = float(masses(np.array(one.probability), np.array(sampled.probability)))
        total = total + mass * one.score * leaf.log_softmax(-1)[list(one.states), list(one.tokens)].sum()
    return torch.autograd.grad(total, leaf)[0]


def decoupled_ppo_is_unbiased(weigh: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]) -> None:
    """One token: whoever sampled, old / sampling times current / old is the gradient of the current policy's score."""
    for logits in (ARM_POLICIES, (ARM_OLD_LOGITS, *ARM_POLICIES[1:])):
        expected = torch.from_numpy(policy_gradient(BANDIT, logits[0]))
        torch.testing.assert_close(stale_step(BANDIT, logits, weigh), expected)


def sequence_weights_are_unbiased(weigh: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]) -> None:
    """Three tokens: the product over the sequence, at the old policy and, with the sequence's ratio, away from it."""
    for logits in (POLICIES, (OLD_LOGITS, *POLICIES[1:])):
        expected = torch.from_numpy(policy_gradient(WRITING, logits[0]))
        torch.testing.assert_close(stale_step(WRITING, logits, weigh, ratio="sequence"), expected)


def truncation_loses_the_mass_above(weigh: Callable[..., torch.Tensor]) -> None:
    """min(pi / mu, C) mu = pi - (pi - C mu)+: the bias is the gradient's part of the mass above C mu, nothing else."""
    for limit in (0.5, 1.0, 2.0):
        for world, logits, behaviour in (
            (BANDIT, ARM_OLD_LOGITS, ARM_BEHAVIOUR_LOGITS),
            (WRITING, OLD_LOGITS, BEHAVIOUR_LOGITS),
        ):
            step = stale_step(world, (logits, logits, behaviour), lambda *a, limit=limit: weigh(*a, limit))
            lost = kept_gradient(world, logits, lambda pi, mu, limit=limit: np.maximum(pi - limit * mu, 0.0))
            assert lost.abs().max() > 0.01
            torch.testing.assert_close(step, torch.from_numpy(policy_gradient(world, logits)) - lost)


def masks_keep_the_mass_inside(parts: SimpleNamespace) -> None:
    """IcePop on one token, the geometric mask on three: what is left is the mass whose (mean) ratio is in the range."""
    low, high = parts.mask_range
    for world, logits, behaviour, length in (
        (BANDIT, ARM_OLD_LOGITS, ARM_BEHAVIOUR_LOGITS, 1),
        (WRITING, OLD_LOGITS, BEHAVIOUR_LOGITS, 3),
    ):

        def kept(pi: np.ndarray, mu: np.ndarray, length: int = length) -> np.ndarray:
            return np.where((low <= (pi / mu) ** (1 / length)) & ((pi / mu) ** (1 / length) <= high), pi, 0.0)

        expected = kept_gradient(world, logits, kept)
        assert (expected - torch.from_numpy(policy_gradient(world, logits))).abs().max() > 0.01
        actual = stale_step(world, (logits, logits, behaviour), parts.token if length == 1 else parts.sequence)
        torch.testing.assert_close(actual, expected)


def loss_penalty_has_the_gradient_of_the_kl(loss: Callable[..., MinibatchLoss]) -> None:
    """With the ratio in the loss the expectation over old samples is KL(current || reference), also away from old.

    At the old policy k2 needs no ratio.  An advantage of 0 leaves nothing but the penalty.
    """
    for estimator, importance_weighted, start in (
        ("k1", True, ARM_LOGITS),
        ("k2", True, ARM_LOGITS),
        ("k3", True, ARM_LOGITS),
        ("k2", False, ARM_OLD_LOGITS),
    ):
        kl = KLConfig(coef=0.5, placement="loss", estimator=estimator, importance_weighted=importance_weighted)
        leaf = torch.from_numpy(start[0]).clone().requires_grad_()
        logprobs, old_logprobs, ref_logprobs = (
            logits.log_softmax(-1) for logits in (leaf, *(torch.from_numpy(one[0]) for one in ARM_POLICIES[1:]))
        )
        nothing = torch.zeros(5, dtype=torch.float64)
        result = loss(
            Predictions(logprobs=logprobs, entropy=nothing, values=None),
            Targets(
                old_logprobs=old_logprobs,
                old_values=nothing,
                advantages=nothing,
                returns=nothing,
                ref_logprobs=ref_logprobs,
                importance=nothing + 1,
                loss_mask=torch.ones(5, dtype=torch.bool),
            ),
            Weighting(lengths=(1,) * 5, weights=old_logprobs.exp(), total_tokens=5, kl_coef=0.5),
            AlgorithmConfig(kl=kl),
        )
        (actual,) = torch.autograd.grad(result.policy, leaf, retain_graph=True)
        (expected,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref_logprobs)).sum(), leaf)
        torch.testing.assert_close(actual, 0.5 * expected)


def with_kl(**changes) -> Callable[..., MinibatchLoss]:
    def twin(predictions, targets, weighting, algorithm):
        kl = KLConfig(**{**algorithm.kl.model_dump(), **changes})
        return minibatch_loss(predictions, targets, weighting, AlgorithmConfig(kl=kl))

    return twin


def reference_and_old_swapped(predictions, targets, weighting, algorithm):
    swapped = replace(targets, old_logprobs=targets.ref_logprobs, ref_logprobs=targets.old_logprobs)
    return minibatch_loss(predictions, swapped, weighting, algorithm)


def masking(**planted) -> SimpleNamespace:
    def token(*a):
        return correct(*a, weight="token", mask="token", mask_range=(0.6, 1.6))

    def sequence(*a):
        return correct(*a, weight="sequence", mask="sequence", mask_range=(0.6, 1.6))

    return SimpleNamespace(**{"token": token, "sequence": sequence, "mask_range": (0.6, 1.6), **planted})


def mismatch_is_the_divergence(implementation: Callable[[torch.Tensor], dict[str, float]]) -> None:
    """Ten tokens in the sampling policy's own proportions (.5, .3, .2); the learner says (.2, .3, .5)."""
    behaviour, old = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    log_ratios = torch.from_numpy(np.repeat(np.log(old / behaviour), [5, 3, 2]))
    divergence = float(behaviour @ np.log(behaviour / old))
    assert implementation(log_ratios) == pytest.approx(
        {
            "mismatch_k1": divergence,
            "mismatch_k3": divergence,
            "mismatch_p99": math.log(2.5),
            "mismatch_ratio_max": 2.5,
            "mismatch_ess": 1 / float((old**2 / behaviour).sum()),
        }
    )


CHECKS = (
    Check(
        id="C8-decoupled-ppo",
        run=decoupled_ppo_is_unbiased,
        part=lambda *a: correct(*a, weight="token"),
        twins={
            "no-weight": correct,
            "upside-down": lambda old, mu, length: correct(mu, old, length, weight="token"),
            "not-detached": lambda old, mu, _: (old - mu).exp(),
            "truncated": lambda *a: correct(*a, weight="token", max_weight=1.0),
            "counted-twice": lambda *a: correct(*a, weight="token").square(),
        },
    ),
    Check(
        id="C8-sequence-weights",
        run=sequence_weights_are_unbiased,
        part=lambda *a: correct(*a, weight="sequence"),
        twins={
            "token-weights": lambda *a: correct(*a, weight="token"),
            "not-detached": lambda old, mu, _: (old - mu).sum(1, keepdim=True).expand_as(old).exp(),
            "geometric-mean": lambda old, mu, _: (old - mu).detach().mean(1, keepdim=True).expand_as(old).exp(),
            "tokens-so-far": lambda old, mu, _: (old - mu).detach().cumsum(1).exp(),
        },
    ),
    Check(
        id="C8-truncation",
        run=truncation_loses_the_mass_above,
        part=lambda *a: correct(*a[:3], weight="sequence", max_weight=a[3]),
        twins={
            "no-limit": lambda *a: correct(*a[:3], weight="sequence"),
            "masked-instead": lambda *a: correct(*a[:3], weight="sequence", mask="token", mask_range=(0.0, a[3])),
            "each-token-truncated": lambda *a: correct(*a[:3], weight="token", max_weight=a[3]),
            "limit-from-below": lambda *a: correct(*a[:3], weight="sequence").clamp(min=a[3]),
        },
    ),
    Check(
        id="C8-masks",
        run=masks_keep_the_mass_inside,
        part=masking(),
        twins={
            "upper-bound-only": masking(
                token=lambda *a: correct(*a, weight="token", mask="token", mask_range=(0, 1.6))
            ),
            "kept-outside": masking(
                token=lambda *a: correct(*a, weight="token") - masking().token(*a),
            ),
            "product-instead-of-mean": masking(
                sequence=lambda *a: correct(*a, weight="sequence", mask="sequence", mask_range=(0.6**3, 1.6**3))
            ),
            "tokens-instead-of-sequence": masking(
                sequence=lambda *a: correct(*a, weight="sequence", mask="token", mask_range=(0.6, 1.6))
            ),
        },
    ),
    Check(
        id="C8-kl-in-loss",
        run=loss_penalty_has_the_gradient_of_the_kl,
        part=minibatch_loss,
        twins={
            "always-k3": with_kl(estimator="k3"),
            "never-weighted": with_kl(estimator="k2", importance_weighted=False),
            "reference-and-old-swapped": reference_and_old_swapped,
        },
    ),
    Check(
        id="C8-mismatch",
        run=mismatch_is_the_divergence,
        part=mismatch,
        twins={"other-direction": lambda x: mismatch(-x), "twice": lambda x: mismatch(2 * x)},
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()
