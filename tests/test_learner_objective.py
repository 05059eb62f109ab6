"""One minibatch's loss: what it is made of, by hand, and that its parts add up over micro-batches.

What a KL term's gradient is where the ratio is in the loss, and far from the old policy, is in
`test_checks_off_policy.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from learner.algorithm_config import AlgorithmConfig
from learner.losses import aggregation_weights
from learner.objective import SHARE_NAMES, MinibatchLoss, Predictions, Targets, Weighting, minibatch_loss
from tests.checks import Case, Check, with_twins

Objective = Callable[[Predictions, Targets, Weighting, AlgorithmConfig], MinibatchLoss]
Given = tuple[Predictions, Targets, Weighting, AlgorithmConfig]

K2 = {"placement": "loss", "estimator": "k2"}


def vector(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def settings(**changes: Any) -> AlgorithmConfig:
    plain = {"value_clip_range": None, "value_coef": 0.1, "entropy_coef": 0.01, "kl": K2}
    return AlgorithmConfig.model_validate(plain | changes)


def by_hand() -> Given:
    """Return two responses, of one token and of one and a token that is not the policy's.

    ratio 1.25, A 1: loss -1.2, clipped; ratio .9, A -2: loss 1.8.  k2 to the reference: ln(2)^2 / 2 and 0.
    """
    predictions = Predictions(
        logprobs=vector(0.5, 0.45, 0.9).log().requires_grad_(),
        entropy=vector(1.0, 0.5, 4.0).requires_grad_(),
        values=vector(1.0, 0.0, 9.0).requires_grad_(),
    )
    targets = Targets(
        old_logprobs=vector(0.4, 0.5, 0.3).log(),
        old_values=vector(0.9, 0.0, 0.0),
        advantages=vector(1.0, -2.0, 5.0),
        returns=vector(2.0, 1.0, 100.0),
        ref_logprobs=vector(0.25, 0.45, 0.1).log(),
        importance=vector(2.0, 0.5, 7.0),
        loss_mask=torch.tensor([True, True, False]),
    )
    weighting = Weighting(lengths=(1, 2), weights=vector(0.5, 0.5, 0.0), total_tokens=2, kl_coef=0.3)
    return predictions, targets, weighting, settings()


POLICY = 0.5 * (2.0 * -1.2) + 0.5 * (0.5 * 1.8)
VALUE = 0.5 * 0.5 + 0.5 * 0.5
ENTROPY = 0.75
KL = 0.5 * 0.2402265
APPROX_KL = 0.5 * (0.25 - 0.2231436) + 0.5 * (-0.1 + 0.1053605)
PENALTY_SLOPES = [0.3 * 0.5 * 0.6931472, 0.0, 0.0]


def composition(implementation: Objective) -> None:
    """Importance weights multiply the policy loss, and no plain KL; the penalty's coefficient is the step's."""
    given = by_hand()
    loss = implementation(*given)
    assert loss.policy.item() == pytest.approx(POLICY - 0.01 * ENTROPY + 0.3 * KL, abs=1e-6)
    assert loss.value is not None
    assert loss.value.item() == pytest.approx(0.1 * VALUE)
    expected = {
        "policy_loss": POLICY,
        "value_loss": VALUE,
        "kl_loss": KL,
        "entropy": ENTROPY,
        "approx_kl": APPROX_KL,
        "clip_fraction": 0.5,
    }
    assert dict(zip(SHARE_NAMES, loss.shares.tolist(), strict=True)) == pytest.approx(expected, abs=1e-6)
    assert loss.ratio_max.item() == pytest.approx(1.25)
    of_policy = torch.autograd.grad(loss.policy, [given[0].logprobs, given[0].entropy], retain_graph=True)
    # clipped: the penalty alone; not clipped: -r A weight importance = .9 * 2 * .5 * .5
    torch.testing.assert_close(of_policy[0], vector(PENALTY_SLOPES[0], 0.45, 0.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(of_policy[1], vector(-0.005, -0.005, 0.0))
    (of_value,) = torch.autograd.grad(loss.value, given[0].values)
    torch.testing.assert_close(of_value, vector(0.1 * 0.5 * -1, 0.1 * 0.5 * -1, 0.0))


def seeing(change: Callable[[Given], Given]) -> Objective:
    return lambda *given: minibatch_loss(*change(given))


def with_targets(change: Callable[[Targets], dict[str, torch.Tensor]]) -> Objective:
    return seeing(lambda given: (given[0], replace(given[1], **change(given[1])), *given[2:]))


def with_algorithm(**changes: Any) -> Objective:
    return seeing(lambda given: (*given[:3], given[3].model_copy(update=changes)))


def importance_on_everything(given: Given) -> Given:
    predictions, targets, weighting, algorithm = given
    weights = weighting.weights * targets.importance
    ones = torch.ones_like(weights)
    return predictions, replace(targets, importance=ones), replace(weighting, weights=weights), algorithm


def coef_of_the_configuration(given: Given) -> Given:
    return *given[:2], replace(given[2], kl_coef=given[3].kl.coef), given[3]


def no_values_no_value_terms(implementation: Objective) -> None:
    predictions, targets, weighting, algorithm = by_hand()
    loss = implementation(replace(predictions, values=None), targets, weighting, algorithm)
    assert loss.value is None
    assert loss.shares[SHARE_NAMES.index("value_loss")] == 0.0
    assert loss.policy.item() == pytest.approx(POLICY - 0.01 * ENTROPY + 0.3 * KL, abs=1e-6)


def values_of_zero(predictions, *rest):
    return minibatch_loss(replace(predictions, values=torch.zeros_like(predictions.logprobs)), *rest)


def penalty_in_the_reward_is_not_in_the_loss(implementation: Objective) -> None:
    *given, _ = by_hand()
    for algorithm, coef in ((settings(kl={}), 0.3), (settings(), 0.0)):
        loss = implementation(*given[:2], replace(given[2], kl_coef=coef), algorithm)
        assert loss.policy.item() == pytest.approx(POLICY - 0.01 * ENTROPY)
        assert loss.shares[SHARE_NAMES.index("kl_loss")] == 0.0


def penalty_in_both(predictions, targets, weighting, algorithm):
    return minibatch_loss(predictions, targets, weighting, settings())


# KL terms on three categories, p = softmax(LOGITS): all tokens once, weighed by the sampling policy's probabilities.

LOGITS, OLD_LOGITS = vector(0.3, -0.2, 0.5), vector(-0.1, 0.4, 0.2)
REFERENCE = vector(0.5, 0.2, 0.3).log()


def penalty_gradient(implementation: Objective, old_logits: torch.Tensor, **kl: Any) -> torch.Tensor:
    """Return the expected gradient of the penalty alone with respect to the logits."""
    leaf = LOGITS.clone().requires_grad_()
    old = old_logits.log_softmax(0)
    nothing = torch.zeros(3, dtype=torch.float64)
    loss = implementation(
        Predictions(logprobs=leaf.log_softmax(0), entropy=nothing, values=None),
        Targets(
            old_logprobs=old,
            old_values=nothing,
            advantages=nothing,
            returns=nothing,
            ref_logprobs=REFERENCE,
            importance=nothing + 1,
            loss_mask=torch.ones(3, dtype=torch.bool),
        ),
        Weighting(lengths=(1, 1, 1), weights=old.exp(), total_tokens=3, kl_coef=1.0),
        settings(entropy_coef=0.0, kl={"placement": "loss", **kl}),
    )
    return torch.autograd.grad(loss.policy, leaf)[0]


def divergence_gradient(is_reversed: bool = False) -> torch.Tensor:
    leaf = LOGITS.clone().requires_grad_()
    logprobs = leaf.log_softmax(0)
    first, second = (REFERENCE, logprobs) if is_reversed else (logprobs, REFERENCE)
    return torch.autograd.grad((first.exp() * (first - second)).sum(), leaf)[0]


def k2_and_k3_on_policy(implementation: Objective) -> None:
    """As they are: k2 has the gradient of KL(policy || reference), k3 that of KL(reference || policy)."""
    torch.testing.assert_close(penalty_gradient(implementation, LOGITS, estimator="k2"), divergence_gradient())
    torch.testing.assert_close(penalty_gradient(implementation, LOGITS, estimator="k3"), divergence_gradient(True))
    assert (divergence_gradient() - divergence_gradient(True)).abs().max() > 0.005


def weighted_anywhere(implementation: Objective) -> None:
    """With the ratio all have the gradient of KL(policy || reference), off-policy too."""
    for estimator in ("k1", "k2", "k3"):
        for old in (LOGITS, OLD_LOGITS):
            found = penalty_gradient(implementation, old, estimator=estimator, importance_weighted=True)
            torch.testing.assert_close(found, divergence_gradient())


def swapped(given: Given) -> Given:
    targets = replace(given[1], old_logprobs=given[1].ref_logprobs, ref_logprobs=given[1].old_logprobs)
    return given[0], targets, *given[2:]


def weighted_by_hand(implementation: Objective) -> None:
    """The weights of the policy loss count here too: ratio 1.25, importance 2, k2 .2402265; the other's k2 is 0."""
    *given, _ = by_hand()
    loss = implementation(*given, settings(kl={**K2, "importance_weighted": True}))
    assert loss.shares[SHARE_NAMES.index("kl_loss")].item() == pytest.approx(0.5 * 1.25 * 2 * 0.2402265, abs=1e-6)


def with_kl(**changes: Any) -> Objective:
    def twin(*given: Any) -> MinibatchLoss:
        algorithm = given[3]
        return minibatch_loss(*given[:3], algorithm.model_copy(update={"kl": algorithm.kl.model_copy(update=changes)}))

    return twin


# Sums over micro-batches, of a minibatch with every term.

LENGTHS = (3, 1, 4, 2)
SPLITS: tuple[Sequence[Sequence[int]], ...] = ([(0, 1, 2, 3)], [(0, 1), (2, 3)], [(3, 0), (), (2,), (1,)])
FULL = settings(aggregation="sequence_mean_token_mean", dual_clip=3.0, value_clip_range=0.2).model_copy(
    update={"ratio": "sequence_mean"}  # with values it may not be configured; together they have every term
)


def minibatch() -> tuple[torch.Tensor, Targets]:
    """Return logprobs, entropy and values [3, S], and their targets."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(9, sum(LENGTHS), generator=generator, dtype=torch.float64)
    mask = torch.ones(sum(LENGTHS), dtype=torch.bool)
    mask[[1, 6]] = False
    old = -1 - rows[3].abs()
    targets = Targets(
        old_logprobs=old,
        old_values=rows[4],
        advantages=rows[5],
        returns=rows[6],
        ref_logprobs=old + 0.3 * rows[7],
        importance=rows[8].abs(),
        loss_mask=mask,
    )
    return torch.stack([old + 0.3 * rows[0], rows[1].abs(), rows[2]]), targets


def adds_up(implementation: Objective) -> None:
    found = []
    for split in SPLITS:
        inputs, targets = minibatch()
        leaf = inputs.requires_grad_()
        tokens = torch.arange(sum(LENGTHS)).split(list(LENGTHS))
        shares, maximum = torch.zeros(len(SHARE_NAMES), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for members in split:
            index = torch.cat([torch.zeros(0, dtype=torch.long), *(tokens[b] for b in members)])
            part = Targets(**{field.name: getattr(targets, field.name)[index] for field in fields(Targets)})
            lengths = tuple(LENGTHS[b] for b in members)
            weights = aggregation_weights(
                lengths,
                part.loss_mask,
                FULL.aggregation,
                total_tokens=int(targets.loss_mask.sum()),
                total_sequences=len(LENGTHS),
                norm_tokens=8,
            )
            weighting = Weighting(
                lengths=lengths, weights=weights, total_tokens=int(targets.loss_mask.sum()), kl_coef=0.2
            )
            logprobs, entropy, values = leaf[:, index]
            predictions = Predictions(logprobs=logprobs, entropy=entropy, values=values)
            loss = implementation(predictions, part, weighting, FULL)
            (loss.policy + loss.value).backward()
            shares, maximum = shares + loss.shares, torch.maximum(maximum, loss.ratio_max.detach())
        found.append((shares, leaf.grad, maximum))
    assert (found[0][1].abs().sum(1) > 0.01).all()
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-12, atol=1e-14)


def means_of_the_micro_batch(predictions, targets, weighting, algorithm):
    total = max(int(targets.loss_mask.sum()), 1)
    return minibatch_loss(predictions, targets, replace(weighting, total_tokens=total), algorithm)


def weights_of_the_micro_batch(predictions, targets, weighting, algorithm):
    weights = weighting.weights / weighting.weights.sum().clamp(min=1e-9)
    return minibatch_loss(predictions, targets, replace(weighting, weights=weights), algorithm)


CHECKS = (
    Check(
        id="composition",
        run=composition,
        part=minibatch_loss,
        twins={
            "importance-on-everything": seeing(importance_on_everything),
            "importance-forgotten": with_targets(lambda t: {"importance": torch.ones_like(t.importance)}),
            "coef-of-the-configuration": seeing(coef_of_the_configuration),
            "entropy-as-a-cost": with_algorithm(entropy_coef=-0.01),
            "kl-to-the-old-policy": with_targets(lambda t: {"ref_logprobs": t.old_logprobs}),
            "masked-tokens-count": with_targets(lambda t: {"loss_mask": torch.ones_like(t.loss_mask)}),
            "value-clipped": with_algorithm(value_clip_range=0.05),
        },
    ),
    Check(
        id="no-values",
        run=no_values_no_value_terms,
        part=minibatch_loss,
        twins={"values-of-zero": values_of_zero},
    ),
    Check(
        id="no-penalty",
        run=penalty_in_the_reward_is_not_in_the_loss,
        part=minibatch_loss,
        twins={"in-both": penalty_in_both, "coef-of-the-configuration": seeing(coef_of_the_configuration)},
    ),
    Check(
        id="kl-on-policy",
        run=k2_and_k3_on_policy,
        part=minibatch_loss,
        twins={
            "always-k2": with_kl(estimator="k2"),
            "always-k3": with_kl(estimator="k3"),
            "always-weighted": with_kl(importance_weighted=True),
        },
    ),
    Check(
        id="kl-weighted",
        run=weighted_anywhere,
        part=minibatch_loss,
        twins={"never-weighted": with_kl(importance_weighted=False), "reference-and-old-swapped": seeing(swapped)},
    ),
    Check(
        id="kl-weighted-by-hand",
        run=weighted_by_hand,
        part=minibatch_loss,
        twins={
            "never-weighted": with_kl(importance_weighted=False),
            "importance-forgotten": with_targets(lambda t: {"importance": torch.ones_like(t.importance)}),
        },
    ),
    Check(
        id="sums",
        run=adds_up,
        part=minibatch_loss,
        twins={"local-means": means_of_the_micro_batch, "local-weights": weights_of_the_micro_batch},
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


@pytest.mark.parametrize("kl", [{"estimator": "k2"}, {"estimator": "k3"}, {"importance_weighted": True}], ids=str)
def test_a_hopeless_token_that_is_not_the_policys_leaves_the_loss_finite(kl) -> None:
    """An environment's token may be impossible under the policy and likely under the reference: it weighs 0."""
    predictions, targets, weighting, _ = by_hand()
    logprobs = vector(-0.7, -0.8, -800.0).requires_grad_()
    far = vector(-0.7, -0.8, 0.0)
    for old, ref in ((logprobs.detach(), far), (logprobs.detach() - vector(0.0, 0.0, 800.0), far)):
        given = replace(targets, old_logprobs=old, ref_logprobs=ref)
        algorithm = settings(kl={"placement": "loss", **kl})
        loss = minibatch_loss(replace(predictions, logprobs=logprobs), given, weighting, algorithm)
        (gradient,) = torch.autograd.grad(loss.policy, logprobs)
        assert loss.policy.isfinite()
        assert gradient.isfinite().all()
        assert loss.shares.isfinite().all()
        assert gradient[2] == 0.0
