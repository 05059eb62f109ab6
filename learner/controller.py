"""The driver's side of learning: composes scores, plans the step for all ranks, controls the KL penalty.

Numbers in, numbers out: it never sees a tensor or a process.  Its state is small and part of every checkpoint.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from actors.schema import check
from learner.batch import StepContext, StepPlan, identity_order, plan_step
from learner.kl import make_kl_controller
from learner.shaping import Composed, RewardComposer
from reward.schema import SAMPLES

if TYPE_CHECKING:
    from learner.config import AlgorithmConfig, LearnerConfig
    from reward.config import RewardConfig

_KL_COLUMNS = ("group_id", "sample_index", "kl")


class StepController:
    """Decides, before each step, everything that the ranks must agree on.

    The verbs of a step, in this order: `plan`, then (the ranks learn) `metrics`, then `observe`.
    """

    def __init__(
        self,
        reward: "RewardConfig",
        learner: "LearnerConfig",
        algorithm: "AlgorithmConfig",
        *,
        num_steps: int,
        seed: int,
    ) -> None:
        self._learner = learner
        self._num_steps = num_steps
        self._seed = seed
        self._composer = RewardComposer(reward, algorithm.missing_eos_penalty)
        self._kl = make_kl_controller(algorithm.kl)

    def plan(self, step: int, samples: pa.Table) -> StepPlan:
        """Compose the batch's scores, taking it into the running moments, and plan the step.

        Args:
            step: From 1.
            samples: SAMPLES of complete groups, rows in any order.

        Raises:
            ValueError: see `RewardComposer.compose` and `plan_step`; or a KL penalty without a reference policy.
        """
        check(samples, SAMPLES, f"learner, step {step}")
        self._check_kl(step, samples)
        context = StepContext(step=step, num_steps=self._num_steps, seed=self._seed, kl_coef=self._kl.coef)
        composed = self._composer.compose(samples)
        return plan_step(samples, composed.scores, learner=self._learner, context=context)

    def observe(self, plan: StepPlan, samples: pa.Table) -> None:
        """Let the KL controller see what the step's samples measured."""
        if samples["kl"].null_count == 0:
            self._kl.update(_mean_kl(samples), len(plan.scores))

    def metrics(self, plan: StepPlan, samples: pa.Table) -> dict[str, float]:
        """Return the step's figures on its samples, before `observe`; names as in the run's metrics."""
        composed = self._composer.compose(samples, update=False)
        return {"kl_coef": plan.kl_coef, **_figures(plan.scores, composed, samples)}

    def evaluation_metrics(self, samples: pa.Table) -> dict[str, float]:
        """Return the same figures of held-out samples, scored with the moments as they are; nothing is remembered."""
        check(samples, SAMPLES, "learner, evaluation")
        composed = self._composer.compose(samples, update=False)
        return _figures(composed.scores[identity_order(samples)], composed, samples)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, JSON-able; floats survive JSON exactly."""
        return {"kl": self._kl.state_dict(), "reward": self._composer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`'s result."""
        self._kl.load_state_dict(state["kl"])
        self._composer.load_state_dict(state["reward"])

    def _check_kl(self, step: int, samples: pa.Table) -> None:
        num_null = samples["kl"].null_count
        if self._kl.coef > 0 and num_null:
            raise ValueError(
                f"every sample must have a kl with algorithm.kl.coef {self._kl.coef}, got {num_null} without (step "
                f"{step}); score with a reference policy or set algorithm.kl.coef=0"
            )
        for group_id, index, kl in zip(*(samples[name].to_pylist() for name in _KL_COLUMNS), strict=True):
            if kl is not None and not math.isfinite(kl):
                raise ValueError(
                    f"kl must be finite, got {kl} (group {group_id!r}, sample {index}); quarantine the group"
                )


def _figures(scores: np.ndarray, composed: Composed, samples: pa.Table) -> dict[str, float]:
    """Figures of a batch; `scores` in identity order, so that sums have the same bits in any order of arrival."""
    lengths = samples["num_response_tokens"].to_numpy()
    reasons = samples["finish_reason"].to_pylist()
    figures = {
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        "kl": _mean_kl(samples) if samples["kl"].null_count == 0 else math.nan,
        "response_length_mean": float(lengths.mean()),
        "eos_fraction": reasons.count("eos") / len(reasons),
        "truncated_fraction": reasons.count("length") / len(reasons),
    }
    for name in composed.means:
        figures[f"{name}_mean"], figures[f"{name}_std"] = composed.means[name], composed.stds[name]
        figures[f"{name}_num_absent"] = float(composed.num_absent[name])
    return figures


def _mean_kl(samples: pa.Table) -> float:
    """Mean nats per sequence, summed in identity order."""
    return float(samples["kl"].to_numpy().astype(np.float64)[identity_order(samples)].mean())
