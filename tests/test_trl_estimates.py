"""Equal to TRL in what is fixed before the loss: GRPO's and RLOO's advantages, weights for another policy's samples.

Where the two differ:
- TRL adds 1e-4 to the group's standard deviation, Concord 1e-6 as DeepSeek does.
- TRL masks sequences by the product of their ratios, Concord by the geometric mean.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from learner.algorithm_config import AlgorithmConfig
from learner.algorithms import estimator_of
from learner.estimators import Experience
from learner.off_policy import importance_weights
from tests import trl_toys
from tests.checks import Case, Check, with_twins
from tests.trl_toys import NUM_GENERATIONS


def algorithm(name: str) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate(name)


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


# Weights for completions of another policy.

Weigh = Callable[..., torch.Tensor]
OFF_POLICY_CASES: tuple[tuple[tuple[str, float | None, float | None], dict[str, Any]], ...] = (
    (("token_truncate", None, 2.0), {"weight": "token", "max_weight": 2.0, "mask": "none", "mask_range": None}),
    (("sequence_truncate", None, 3.0), {"weight": "sequence", "max_weight": 3.0, "mask": "none", "mask_range": None}),
    (("token_mask", 0.5, 2.0), {"weight": "token", "max_weight": None, "mask": "token", "mask_range": (0.5, 2.0)}),
)
"""TRL's mode with its lower and upper clip, and ours: truncated importance sampling of both kinds, IcePop."""


def off_policy_weights_are_trls(weigh: Weigh) -> None:
    for trls, settings in OFF_POLICY_CASES:
        inputs = trl_toys.generated_elsewhere(*trls)
        is_token = inputs["completion_mask"].bool()
        old, recorded = (inputs[f"{name}_per_token_logps"][is_token] for name in ("old", "sampling"))
        mask = torch.ones_like(old, dtype=torch.bool)
        actual = weigh(old, recorded, inputs["completion_mask"].sum(1).tolist(), mask, **settings)
        expected = inputs["importance_sampling_ratio"].expand(is_token.shape)[is_token]
        assert expected.min() < expected.max()
        torch.testing.assert_close(actual, expected)


def weights_upside_down(old: torch.Tensor, behaviour: torch.Tensor, *rest: Any, **settings: Any) -> torch.Tensor:
    return importance_weights(behaviour, old, *rest, **settings)


def weights_not_bounded(*arguments: Any, **settings: Any) -> torch.Tensor:
    return importance_weights(*arguments, **(settings | {"max_weight": None, "mask": "none"}))


OFF_POLICY_CHECKS = (
    Check(
        id="off-policy-weights",
        run=off_policy_weights_are_trls,
        part=importance_weights,
        twins={"upside-down": weights_upside_down, "not-bounded": weights_not_bounded},
    ),
)


CHECKS = (*ADVANTAGE_CHECKS, *OFF_POLICY_CHECKS)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()
