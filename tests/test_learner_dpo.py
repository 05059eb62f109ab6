"""DPO: its loss by hand, its optimum in closed form, and the objective against plain forward passes."""

import math

import pytest
import torch
from torch.nn import functional as F

from learner.config import OptimizerConfig
from learner.dpo import DirectPreference, dpo_loss, dpo_margin
from learner.model import PolicyAndValue
from learner.offline_config import DPOConfig
from learner.offline_data import Pair
from learner.optimizer import make_engine
from learner.training import microbatches
from tests.checks import Case, Check, with_twins
from tests.learner_toys import toy_model

CPU = torch.device("cpu")


def has_values_by_hand(loss) -> None:
    """Margin 0.5 [(-1 + 1.5) - (-2 + 1.5)] = 0.5; -log sigmoid(0.5) = 0.474077, -log sigmoid(-0.5) = 0.974077."""
    chosen, rejected, ref = (torch.tensor([value, -3.0]) for value in (-1.0, -2.0, -1.5))
    rejected[1] = ref[1] = -3.0
    plain = loss(chosen, rejected, ref, ref, beta=0.5, label_smoothing=0.0)
    smooth = loss(chosen, rejected, ref, ref, beta=0.5, label_smoothing=0.1)
    assert plain.tolist() == pytest.approx([0.474077, math.log(2)], abs=1e-6)
    assert smooth.tolist() == pytest.approx([0.524077, math.log(2)], abs=1e-6)


def has_gradient_of_eq_7(loss) -> None:
    """The gradient is -beta sigmoid(-m) [grad log p(chosen) - grad log p(rejected)]; sigmoid(-0.5) = 0.377541."""
    chosen, rejected = torch.tensor([-1.0], requires_grad=True), torch.tensor([-2.0], requires_grad=True)
    ref = torch.tensor([-1.5])
    loss(chosen, rejected, ref, ref, beta=0.5, label_smoothing=0.0).sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.5 * 0.377541, abs=1e-6)
    assert rejected.grad.item() == pytest.approx(0.5 * 0.377541, abs=1e-6)


def is_stationary_at_the_optimum(loss) -> None:
    """Under Bradley-Terry preferences the expected loss has no gradient at pi* ~ pi_ref exp(r / beta).

    pi_ref = (.5, .3, .2), r = (0, 1, 2), beta = 1: pi* = (.179, .291944, .529056).
    """
    ref, rewards = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.0, 1.0, 2.0]).double()
    optimum = ref * rewards.exp() / (ref * rewards.exp()).sum()
    assert optimum.tolist() == pytest.approx([0.179, 0.291944, 0.529056], abs=1e-6)
    logits = optimum.log().requires_grad_()
    logprobs = logits.log_softmax(0)
    first, second = torch.tensor([(i, j) for i in range(3) for j in range(3) if i != j]).unbind(1)
    losses = loss(logprobs[first], logprobs[second], ref.log()[first], ref.log()[second], beta=1.0, label_smoothing=0.0)
    is_preferred = (rewards[first] - rewards[second]).sigmoid()
    (ref[first] * ref[second] * is_preferred * losses).sum().backward()
    assert logits.grad.abs().max() < 1e-12


def without_reference(chosen, rejected, ref_chosen, ref_rejected, **settings):
    return dpo_loss(chosen, rejected, torch.zeros_like(ref_chosen), torch.zeros_like(ref_rejected) - 1.0, **settings)


def swapped(chosen, rejected, ref_chosen, ref_rejected, **settings):
    return dpo_loss(rejected, chosen, ref_rejected, ref_chosen, **settings)


def smoothed_twice(*logprobs, beta, label_smoothing):
    margin = dpo_margin(*logprobs, beta=beta)
    return -F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def beta_outside(*logprobs, beta, label_smoothing):
    margin = dpo_margin(*logprobs, beta=1.0)
    return -beta * ((1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin))


def reference_added(chosen, rejected, ref_chosen, ref_rejected, **settings):
    return dpo_loss(chosen, rejected, -ref_chosen, -ref_rejected, **settings)


CHECKS = (
    Check(
        id="DPO-by-hand",
        run=has_values_by_hand,
        part=dpo_loss,
        twins={"no-reference": without_reference, "swapped": swapped, "smoothed-twice": smoothed_twice},
    ),
    Check(
        id="DPO-gradient",
        run=has_gradient_of_eq_7,
        part=dpo_loss,
        twins={"beta-outside": beta_outside, "swapped": swapped},
    ),
    Check(
        id="DPO-optimum",
        run=is_stationary_at_the_optimum,
        part=dpo_loss,
        twins={"reference-added": reference_added, "swapped": swapped},
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


def _pair(prompt: list[int], chosen: list[int], rejected: list[int], masked: int = 0) -> Pair:
    return Pair(
        prompt_ids=prompt,
        chosen_ids=chosen,
        rejected_ids=rejected,
        chosen_is_learnt=[index >= masked for index in range(len(chosen))],
        rejected_is_learnt=[True] * len(rejected),
    )


PAIRS = [
    _pair([3, 4], [5, 6, 7], [8]),
    _pair([9], [1, 2], [2, 1, 5, 5]),
    _pair([3, 4, 5], [6, 6, 9, 2], [7, 1], masked=2),
]


def _objective(settings: DPOConfig, pairs: list[Pair] = PAIRS):
    module = PolicyAndValue(toy_model(), has_value_head=False)
    objective = DirectPreference(module, pairs, settings, CPU)
    return objective, make_engine(module, OptimizerConfig(), backend="local", zero_stage=0)


def _logprob(model, prompt: list[int], response: list[int], is_learnt: list[bool]) -> torch.Tensor:
    """One sequence, the plain way."""
    ids = torch.tensor([prompt + response])
    logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return (logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0] * torch.tensor(is_learnt)).sum()


def _expected(model, reference, settings: DPOConfig) -> torch.Tensor:
    losses = []
    for pair in PAIRS:
        sides = ((pair.chosen_ids, pair.chosen_is_learnt), (pair.rejected_ids, pair.rejected_is_learnt))
        ours, theirs = ([_logprob(m, pair.prompt_ids, *side) for side in sides] for m in (model, reference))
        margin = settings.beta * ((ours[0] - theirs[0].detach()) - (ours[1] - theirs[1].detach()))
        losses.append(-F.logsigmoid(margin) - settings.sft_coef * ours[0] / sum(pair.chosen_is_learnt))
    return torch.stack(losses).sum()


def test_before_the_first_update_the_policy_is_its_own_reference():
    objective, engine = _objective(DPOConfig(beta=0.3))
    assert objective.loss_sum(engine, [0, 1, 2]).item() == pytest.approx(3 * math.log(2), abs=1e-5)


@pytest.mark.parametrize("sft_coef", [0.0, 0.7])
def test_the_objective_is_the_loss_of_whole_responses_without_masked_tokens(sft_coef):
    settings = DPOConfig(beta=0.3, sft_coef=sft_coef)
    objective, engine = _objective(settings)
    policy = engine.module.policy
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    loss = objective.loss_sum(engine, [0, 1, 2])
    expected = _expected(policy, toy_model(), settings)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, [policy.get_input_embeddings().weight], retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, [policy.get_input_embeddings().weight])
    assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-5)
    unmasked = [_pair(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in PAIRS]
    twin = DirectPreference(PolicyAndValue(toy_model(), has_value_head=False), unmasked, settings, CPU)
    assert twin.loss_sum(engine, [0, 1, 2]).item() != pytest.approx(expected.item(), rel=1e-4)


def test_microbatches_and_company_do_not_change_the_loss():
    objective, engine = _objective(DPOConfig())
    with torch.no_grad():
        engine.module.policy.get_output_embeddings().weight.mul_(1.5)
    whole = objective.loss_sum(engine, [0, 1, 2]).item()
    parts = sum(objective.loss_sum(engine, part).item() for part in ([2], [0, 1]))
    assert whole == pytest.approx(parts, abs=1e-5)
    assert list(microbatches([0, 1, 2], objective.lengths, max_tokens=1)) == [[0], [1], [2]]
    assert objective.lengths == [6, 7, 9]
    assert objective.units == [1, 1, 1]


def test_the_metrics_are_those_of_one_update():
    objective, engine = _objective(DPOConfig(beta=1.0))
    with torch.no_grad():
        engine.module.policy.get_output_embeddings().weight.mul_(1.5)
    first = [objective.loss_sum(engine, [index]).item() for index in range(3)]
    margins = [-math.log(math.expm1(loss)) for loss in first]  # the loss is log(1 + exp(-m))
    found = objective.after_update()
    assert found["implicit_margin"] == pytest.approx(sum(margins) / 3, abs=1e-4)
    assert found["implicit_accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 3)
    objective.loss_sum(engine, [1])
    assert objective.after_update()["implicit_margin"] == pytest.approx(margins[1], abs=1e-4), "nothing is left over"
