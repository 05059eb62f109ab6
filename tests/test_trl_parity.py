"""Equal to TRL where TRL has the algorithm: GRPO's family and RLOO, losses and advantages, and DPO.

Where the two differ:
- TRL adds 1e-4 to the group's standard deviation, Concord 1e-6 as the paper does.
- TRL's KL term is weighted by the ratio unless `use_bias_correction_kl` is off, Concord's if `importance_weighted`.
- TRL's cispo has no lower clip, and its upper one is the ratio itself, not its distance from 1.
- TRL's sigmoid loss has no label smoothing; its `aot_unpaired` of a single pair is the same formula with it.
- TRL masks sequences by the product of their ratios, Concord by the geometric mean.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from actors.rows import PromptGroup
from learner.algorithm_config import AlgorithmConfig
from learner.algorithms import estimator_of
from learner.config import OptimizerConfig
from learner.dpo import DirectPreference
from learner.estimators import Experience
from learner.local import LocalEngine
from learner.losses import aggregation_weights
from learner.model import PolicyAndValue, Scoring
from learner.objective import Predictions, Targets, Weighting, minibatch_loss
from learner.off_policy import importance_weights
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

# Advantages: TRL's from one generation of its own with given rewards; ours of the same responses.

REWARDS = (0.1, 0.5, 0.2, 1.0, 3.0, 3.0, 2.0, -1.0)
TRL_EPS, OUR_EPS = 1e-4, 1e-6
Advantages = Callable[[AlgorithmConfig, Experience], torch.Tensor]


def our_advantages(settings: AlgorithmConfig, experience: Experience) -> torch.Tensor:
    """Return [B]: all tokens of a response have the same."""
    rows = estimator_of(settings)(experience, settings).advantages
    assert all((row == row[0]).all() for row in rows)
    return torch.stack([row[0] for row in rows])


def experience_of(inputs: dict[str, torch.Tensor], kl_coef: float = 0.0) -> Experience:
    """Return the responses that TRL generated: the KL penalty on each token, the score on the last."""
    rewards = []
    for row, score in enumerate(REWARDS):
        own = inputs["completion_mask"][row].bool()
        tokens = torch.zeros(int(own.sum()))
        if kl_coef:
            tokens -= kl_coef * (inputs["old_per_token_logps"] - inputs["ref_per_token_logps"])[row][own]
        tokens[-1] += score
        rewards.append(tokens)
    zeros = [torch.zeros_like(row) for row in rewards]
    return Experience(
        group_sizes=(NUM_GENERATIONS,) * (len(REWARDS) // NUM_GENERATIONS),
        rewards=rewards,
        values=[torch.zeros(len(row) + 1) for row in rewards],
        log_ratios=zeros,
        baseline=0.0,
    )


def grpo_advantages_are_trls(advantages: Advantages) -> None:
    scaled = trl_toys.generated(trl_toys.grpo_trainer(REWARDS))
    plain = trl_toys.generated(trl_toys.grpo_trainer(REWARDS, scale_rewards="none"))
    experience = experience_of(scaled)
    of_group = torch.tensor(REWARDS).reshape(-1, NUM_GENERATIONS).std(1, keepdim=True)
    difference = ((of_group + OUR_EPS) / (of_group + TRL_EPS)).expand(-1, NUM_GENERATIONS).flatten()
    torch.testing.assert_close(advantages(algorithm("grpo"), experience) * difference, scaled["advantages"])
    torch.testing.assert_close(advantages(algorithm("dr_grpo"), experience), plain["advantages"])


def by_the_population(settings: AlgorithmConfig, experience: Experience) -> torch.Tensor:
    factor = (NUM_GENERATIONS / (NUM_GENERATIONS - 1)) ** 0.5 if settings.scale_by_std else 1.0
    return factor * our_advantages(settings, experience)


def over_the_batch(settings: AlgorithmConfig, experience: Experience) -> torch.Tensor:
    return our_advantages(settings, dataclasses.replace(experience, group_sizes=(len(REWARDS),)))


def rloo_advantages_are_trls(advantages: Advantages) -> None:
    for beta in (0.0, 0.5):
        trainer = trl_toys.rloo_trainer(REWARDS, beta=beta)
        with torch.no_grad():  # away from the reference, so that there is something to penalise
            trainer.model.get_output_embeddings().weight.mul_(1.5)
        inputs, seen = generated_with_reference(trainer)
        actual = advantages(algorithm("rloo"), experience_of(inputs | seen, kl_coef=beta))
        torch.testing.assert_close(actual, inputs["advantages"], rtol=1e-5, atol=1e-5)


def generated_with_reference(trainer: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return what RLOO generated, and the log-probs it looked at on the way: the policy's, then the reference's."""
    looks: list[torch.Tensor] = []
    look = trainer._get_per_token_logps_and_entropies

    def recorded(*arguments: Any, **settings: Any) -> Any:
        found = look(*arguments, **settings)
        looks.append(found[0].detach())
        return found

    trainer._get_per_token_logps_and_entropies = recorded
    inputs = trl_toys.generated(trainer)
    return inputs, {"old_per_token_logps": looks[0], "ref_per_token_logps": looks[-1]}


def with_own_score_in_the_baseline(settings: AlgorithmConfig, experience: Experience) -> torch.Tensor:
    return our_advantages(algorithm("dr_grpo"), experience)


def without_penalty(settings: AlgorithmConfig, experience: Experience) -> torch.Tensor:
    last_only = [torch.cat([torch.zeros_like(row[:-1]), row[-1:]]) for row in experience.rewards]
    return our_advantages(settings, dataclasses.replace(experience, rewards=last_only))


ADVANTAGE_CHECKS = (
    Check(
        id="grpo-advantages",
        run=grpo_advantages_are_trls,
        part=our_advantages,
        twins={"population-std": by_the_population, "over-the-batch": over_the_batch},
    ),
    Check(
        id="rloo-advantages",
        run=rloo_advantages_are_trls,
        part=our_advantages,
        twins={"own-score-in-baseline": with_own_score_in_the_baseline, "no-penalty": without_penalty},
    ),
)


# The whole way from token ids to gradients of the model's parameters.

Gradients = dict[str, torch.Tensor]
PAIRS = (
    {"prompt": "ab", "chosen": "cde", "rejected": "fghij"},
    {"prompt": "klm", "chosen": "nopq", "rejected": "r"},
    {"prompt": "st", "chosen": "uv", "rejected": "wx"},
)


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


def dpo_gradients(beta: float, label_smoothing: float, pairs: Sequence[dict[str, str]]) -> Gradients:
    """Return what the DPO objective makes of the policy of seed 1, with that of seed 0 as the reference."""
    module = PolicyAndValue(trl_toys.loaded_model(0), has_value_head=False)
    settings = DPOConfig(beta=beta, label_smoothing=label_smoothing)
    dpo = DirectPreference(module, [dpo_pair(**pair) for pair in pairs], settings, CPU)
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
        expected = trl_toys.dpo_gradients(pairs, beta=0.3, label_smoothing=label_smoothing, loss_type=[loss_type])
        torch.testing.assert_close(gradients(0.3, label_smoothing, pairs), expected, rtol=1e-4, atol=1e-6)


def of_sides_swapped(beta: float, label_smoothing: float, pairs: Sequence[dict[str, str]]) -> Gradients:
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    return dpo_gradients(beta, label_smoothing, swapped)


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

CHECKS = (*LOSS_CHECKS, *ADVANTAGE_CHECKS, *MODEL_CHECKS)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()
