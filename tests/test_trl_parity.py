"""Equal to TRL where TRL has the algorithm: the losses of GRPO's family, RLOO and DPO, and their gradients.

Where the two differ:
- TRL's KL term is weighted by the ratio unless `use_bias_correction_kl` is off, Concord's if `importance_weighted`.
- TRL's cispo has no lower clip, and its upper one is the ratio itself, not its distance from 1.
- TRL's sigmoid loss has no label smoothing; its `aot_unpaired` of a single pair is the same formula with it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from actors.rows import PromptGroup
from learner.algorithm_config import AlgorithmConfig
from learner.config import OptimizerConfig
from learner.dpo import DirectPreference
from learner.local import LocalEngine
from learner.losses import aggregation_weights
from learner.model import PolicyAndValue, Scoring
from learner.objective import Predictions, Targets, Weighting, minibatch_loss
from learner.offline_config import DPOConfig
from learner.offline_data import Pair
from tests import trl_toys
from tests.checks import Case, Check, with_twins
from tests.trl_toys import MAX_NEW_TOKENS, NUM_GENERATIONS, TEMPERATURE, Oracle, Padded, padded_batch

CPU = torch.device("cpu")
Loss = tuple[torch.Tensor, torch.Tensor]
Ours = Callable[[Padded], Loss]


def algorithm(name: str, **settings: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate({"name": name, **settings})


def objective(settings: AlgorithmConfig, logprobs: torch.Tensor, targets: Targets, lengths: Sequence[int]) -> Any:
    """Return the learner's loss of a minibatch in one piece."""
    total_tokens = int(targets.loss_mask.sum())
    weights = aggregation_weights(
        lengths,
        targets.loss_mask,
        settings.aggregation,
        total_tokens=total_tokens,
        total_sequences=len(lengths),
        norm_tokens=MAX_NEW_TOKENS,
    )
    weighting = Weighting(lengths=tuple(lengths), weights=weights, total_tokens=total_tokens, kl_coef=settings.kl.coef)
    predictions = Predictions(logprobs=logprobs, entropy=torch.zeros_like(logprobs), values=None)
    return minibatch_loss(predictions, targets, weighting, settings).policy


def flat_targets(batch: Padded) -> Targets:
    is_token = batch.is_token
    old = batch.old_logprobs[is_token]
    return Targets(
        old_logprobs=old,
        old_values=torch.zeros_like(old),
        advantages=batch.advantages.repeat_interleave(torch.tensor(batch.lengths)),
        returns=torch.zeros_like(old),
        ref_logprobs=batch.ref_logprobs[is_token],
        importance=torch.ones_like(old),
        loss_mask=batch.is_own[is_token],
    )


def ours(settings: AlgorithmConfig) -> Ours:
    """Return the learner's loss, and its gradient at the response tokens, under a configuration."""

    def loss(batch: Padded) -> Loss:
        leaf = batch.logprobs[batch.is_token].requires_grad_()
        total = objective(settings, leaf, flat_targets(batch), batch.lengths)
        return total.detach(), torch.autograd.grad(total, leaf)[0]

    return loss


def on(change: Callable[[Padded], Padded], loss: Ours) -> Ours:
    """Return the loss of a batch with something mixed up."""
    return lambda batch: loss(change(batch))


def roles_swapped(batch: Padded) -> Padded:
    return dataclasses.replace(batch, old_logprobs=batch.ref_logprobs, ref_logprobs=batch.old_logprobs)


def mask_late(batch: Padded) -> Padded:
    return dataclasses.replace(batch, is_own=batch.is_own.roll(1, 1))


def equals_trl(loss: Ours, oracle: Oracle, *, has_tools: bool = True) -> None:
    """Near the old policy, and far from it where clips are active."""
    for spread in (0.05, 0.8):
        batch = padded_batch(spread)
        if not has_tools:
            batch = dataclasses.replace(batch, is_own=torch.ones_like(batch.is_own))
        expected, actual = oracle(batch), loss(batch)
        assert expected[1].abs().max() > 1e-3
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)  # weights are float32


NO_KL = {"coef": 0.0}
GRPO = partial(algorithm, "grpo", kl=NO_KL)
LOSS_CHECKS = (
    Check(
        id="grpo",
        run=partial(equals_trl, oracle=trl_toys.grpo_loss(loss_type="grpo")),
        part=ours(GRPO()),
        twins={
            "token-mean": ours(GRPO(aggregation="token_mean")),
            "clip-too-wide": ours(GRPO(clip_range=0.4)),
            "mask-late": on(mask_late, ours(GRPO())),
        },
    ),
    Check(
        id="grpo-k3",
        run=partial(equals_trl, oracle=trl_toys.grpo_loss(loss_type="grpo", beta=0.04, use_bias_correction_kl=False)),
        part=ours(algorithm("grpo")),
        twins={
            "k2": ours(algorithm("grpo", kl={"estimator": "k2"})),
            "old-for-reference": on(roles_swapped, ours(algorithm("grpo"))),
            "no-kl": ours(GRPO()),
        },
    ),
    Check(
        id="grpo-k3-weighted",
        run=partial(equals_trl, oracle=trl_toys.grpo_loss(loss_type="grpo", beta=0.04)),
        part=ours(algorithm("grpo", kl={"importance_weighted": True})),
        twins={"not-weighted": ours(algorithm("grpo"))},
    ),
    Check(
        id="grpo-dual-clip",
        run=partial(equals_trl, oracle=trl_toys.grpo_loss(loss_type="grpo", delta=1.5)),
        part=ours(GRPO(dual_clip=1.5)),
        twins={"no-dual-clip": ours(GRPO()), "later": ours(GRPO(dual_clip=1.8))},
    ),
    Check(
        id="dr-grpo",
        run=partial(equals_trl, oracle=trl_toys.grpo_loss(loss_type="dr_grpo")),
        part=ours(algorithm("dr_grpo")),
        twins={
            "not-normed": ours(algorithm("dr_grpo", aggregation="sequence_mean_token_sum")),
            "own-length": ours(algorithm("dr_grpo", aggregation="sequence_mean_token_mean")),
        },
    ),
    Check(
        id="dapo",
        run=partial(equals_trl, oracle=trl_toys.grpo_loss(loss_type="dapo", epsilon_high=0.28)),
        part=ours(algorithm("dapo")),
        twins={
            "one-clip": ours(algorithm("dapo", clip_range_high=0.2)),
            "own-length": ours(algorithm("dapo", aggregation="sequence_mean_token_mean")),
        },
    ),
    Check(
        id="gspo",
        run=partial(
            equals_trl,
            oracle=trl_toys.grpo_loss(
                loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4
            ),
        ),
        part=ours(algorithm("gspo")),
        twins={
            "product": ours(algorithm("gspo", ratio="sequence")),
            "token": ours(algorithm("gspo", ratio="token")),
            "mask-late": on(mask_late, ours(algorithm("gspo"))),
        },
    ),
    Check(
        id="cispo",
        run=partial(equals_trl, oracle=trl_toys.grpo_loss(loss_type="cispo", epsilon_high=1.5)),
        part=ours(algorithm("cispo", clip_range_high=0.5)),
        twins={
            "lower-clip": ours(algorithm("cispo", clip_range=0.2, clip_range_high=0.5)),
            "ppo-clip": ours(algorithm("cispo", policy_loss="ppo_clip", clip_range_high=0.5)),
        },
    ),
    Check(
        id="rloo",
        run=partial(equals_trl, oracle=trl_toys.rloo_loss(), has_tools=False),
        part=ours(algorithm("rloo")),
        twins={
            "token-ratio": ours(algorithm("rloo", ratio="token")),
            "mean-over-tokens": ours(algorithm("rloo", aggregation="sequence_mean_token_mean")),
        },
    ),
)

REWARDS = (0.1, 0.5, 0.2, 1.0, 3.0, 3.0, 2.0, -1.0)

# The whole way from token ids to gradients of the model's parameters.

Gradients = dict[str, torch.Tensor]
TextPairs = tuple[tuple[str, str, str], ...]
PAIRS: TextPairs = (("ab", "cde", "fghij"), ("klm", "nopq", "r"), ("st", "uv", "wx"))
"""Prompt, chosen, rejected."""


def gradients_of(model: torch.nn.Module) -> Gradients:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def grpo_gradients(settings: AlgorithmConfig, inputs: dict[str, torch.Tensor], temperature: float) -> Gradients:
    """Return what the learner's networks make of the responses that TRL generated."""
    module = PolicyAndValue(trl_toys.loaded_model(0), has_value_head=False)
    groups, lengths = [], []
    for prompt in range(len(trl_toys.PROMPTS)):
        rows = range(prompt * NUM_GENERATIONS, (prompt + 1) * NUM_GENERATIONS)
        own = [inputs["completion_ids"][row][inputs["completion_mask"][row].bool()].tolist() for row in rows]
        prompt_ids = inputs["prompt_ids"][rows[0]][inputs["prompt_mask"][rows[0]].bool()].tolist()
        groups.append(PromptGroup(prompt_ids=prompt_ids, responses=own))
        lengths += [len(response) for response in own]
    logprobs, _, _ = module(module.scorer.row(groups), Scoring(temperature=temperature, chunk_tokens=64))
    is_token = inputs["completion_mask"].bool()
    targets = Targets(
        old_logprobs=inputs["old_per_token_logps"][is_token],
        old_values=torch.zeros_like(logprobs),
        advantages=inputs["advantages"].repeat_interleave(torch.tensor(lengths)),
        returns=torch.zeros_like(logprobs),
        ref_logprobs=inputs["ref_per_token_logps"][is_token],
        importance=torch.ones_like(logprobs),
        loss_mask=torch.ones_like(logprobs, dtype=torch.bool),
    )
    objective(settings, logprobs, targets, lengths).backward()
    return gradients_of(module.policy)


def model_gradients_are_trls(gradients: Callable[..., Gradients]) -> None:
    trainer = trl_toys.grpo_trainer(REWARDS, loss_type="grpo", beta=0.04, use_bias_correction_kl=False)
    inputs = trl_toys.generated(trainer)
    generator = torch.Generator().manual_seed(4)
    for name in ("old_per_token_logps", "ref_per_token_logps"):  # as if the policy had moved since
        inputs[name] = inputs[name] + 0.3 * torch.randn(inputs[name].shape, generator=generator)
    trainer.model.eval()
    trainer._compute_loss(trainer.model, inputs).backward()
    expected = gradients_of(trainer.model)
    assert expected
    torch.testing.assert_close(gradients(algorithm("grpo"), inputs, TEMPERATURE), expected, rtol=1e-4, atol=1e-6)


def dpo_gradients(beta: float, label_smoothing: float, pairs: TextPairs) -> Gradients:
    """Return what the DPO objective makes of the policy of seed 1, with that of seed 0 as the reference."""
    module = PolicyAndValue(trl_toys.loaded_model(0), has_value_head=False)
    settings = DPOConfig(beta=beta, label_smoothing=label_smoothing)
    dpo = DirectPreference(module, [dpo_pair(*pair) for pair in pairs], settings, CPU)
    module.policy.load_state_dict(trl_toys.loaded_model(1).state_dict())
    engine = LocalEngine(module, OptimizerConfig())
    (dpo.loss_sum(engine, range(len(pairs))) / len(pairs)).backward()
    return gradients_of(module.policy)


def dpo_pair(prompt: str, chosen: str, rejected: str) -> Pair:
    def ids(text: str, *, ends: bool) -> list[int]:
        return trl_toys.token_ids(text, ends=ends)

    chosen_ids, rejected_ids = ids(chosen, ends=True), ids(rejected, ends=True)
    return Pair(
        prompt_ids=ids(prompt, ends=False),
        chosen_ids=chosen_ids,
        rejected_ids=rejected_ids,
        chosen_is_learnt=[True] * len(chosen_ids),
        rejected_is_learnt=[True] * len(rejected_ids),
    )


def dpo_gradients_are_trls(gradients: Callable[..., Gradients]) -> None:
    """The sigmoid loss of three pairs; with label smoothing, of each pair alone."""
    cases = [(PAIRS, 0.0, "sigmoid"), *(((pair,), 0.2, "aot_unpaired") for pair in PAIRS)]
    for pairs, label_smoothing, loss_type in cases:
        expected = trl_toys.dpo_gradients(pairs, beta=0.3, label_smoothing=label_smoothing, loss_type=loss_type)
        torch.testing.assert_close(gradients(0.3, label_smoothing, pairs), expected, rtol=1e-4, atol=1e-6)


def of_sides_swapped(beta: float, label_smoothing: float, pairs: TextPairs) -> Gradients:
    return dpo_gradients(beta, label_smoothing, tuple((prompt, lost, won) for prompt, won, lost in pairs))


MODEL_CHECKS = (
    Check(
        id="grpo-model",
        run=model_gradients_are_trls,
        part=grpo_gradients,
        twins={"no-temperature": lambda settings, inputs, _: grpo_gradients(settings, inputs, 1.0)},
    ),
    Check(
        id="dpo-model",
        run=dpo_gradients_are_trls,
        part=dpo_gradients,
        twins={
            "sides-swapped": of_sides_swapped,
            "no-smoothing": lambda beta, _, pairs: dpo_gradients(beta, 0.0, pairs),
            "beta-forgotten": lambda _, smoothing, pairs: dpo_gradients(1.0, smoothing, pairs),
        },
    ),
)

CHECKS = (*LOSS_CHECKS, *MODEL_CHECKS)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()
