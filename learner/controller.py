"""The driver's side of learning: composes scores, plans the step for all ranks, controls KL penalty and constraint.

Numbers in, numbers out: it never sees a tensor or a process.  Its state is small and part of every checkpoint.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from actors.schema import check
from learner.batch import StepContext, StepPlan, identity_order, plan_step
from learner.constraint import Constraint
from learner.kl import make_kl_controller
from learner.penalties import Penalties
from learner.shaping import Composed, RewardComposer
from reward.schema import SAMPLES

if TYPE_CHECKING:
    from learner.algorithm_config import AlgorithmConfig
    from learner.config import LearnerConfig
    from reward.config import RewardConfig

_KL_COLUMNS = ("group_id", "sample_index", "kl")


class EmaBaseline:
    """An exponential moving average of batches' mean scores: b <- decay b + (1 - decay) mean, at first the mean.

    A step is scored against what was there before it, so that the baseline does not depend on its own samples; before
    the first one that is 0.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._average: float | None = None

    @property
    def value(self) -> float:
        """The baseline that the next step uses."""
        return 0.0 if self._average is None else self._average

    def update(self, mean: float) -> None:
        """Take a step's mean score in."""
        before = mean if self._average is None else self._average
        self._average = self._decay * before + (1.0 - self._decay) * mean

    def state_dict(self) -> dict[str, Any]:
        """Return the average, None before the first step."""
        return {"average": self._average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the average."""
        self._average = state["average"]


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
        max_new_tokens: int,
    ) -> None:
        self._reward = reward
        self._learner = learner
        self._num_steps = num_steps
        self._seed = seed
        self._step = 0
        self._composer = RewardComposer(reward, Penalties.of(algorithm, max_new_tokens=max_new_tokens))
        self._kl = make_kl_controller(algorithm.kl)
        self._has_own_reference = algorithm.reference.mode != "fixed"  # it lives with the ranks
        self._constraint = None if reward.constraint is None else Constraint(reward.constraint)
        self._baseline = EmaBaseline(algorithm.baseline_decay) if algorithm.baseline == "ema" else None

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
        context = StepContext(
            step=step,
            num_steps=self._num_steps,
            seed=self._seed,
            kl_coef=self._kl.coef,
            baseline=0.0 if self._baseline is None else self._baseline.value,
        )
        composed = self._composer.compose(samples, step=step)
        self._step = step
        return plan_step(samples, self._scores(composed), learner=self._learner, context=context)

    def observe(self, plan: StepPlan, samples: pa.Table, learner_metrics: Mapping[str, float]) -> None:
        """Let KL controller, constraint and baseline see what the step measured.

        Args:
            plan: Of the step.
            samples: SAMPLES that it was planned for.
            learner_metrics: What the ranks measured; with a reference policy of theirs the KL to it is there, as
                `reference_kl` in nats per sequence; the samples' own KL, if any, is to the first reference.
        """
        if self._has_own_reference:
            self._kl.update(learner_metrics["reference_kl"], len(plan.scores))
        elif samples["kl"].null_count == 0:
            self._kl.update(_mean_kl(samples), len(plan.scores))
        if self._constraint is not None:
            costs = self._composer.compose(samples, step=plan.step, update=False).costs
            self._constraint.update(costs[identity_order(samples)], step=plan.step)
        if self._baseline is not None:
            self._baseline.update(float(plan.scores.mean()))

    def metrics(self, plan: StepPlan, samples: pa.Table) -> dict[str, float]:
        """Return the step's figures on its samples, before `observe`; names as in the run's metrics."""
        composed = self._composer.compose(samples, step=plan.step, update=False)
        figures = {"kl_coef": plan.kl_coef, **self._figures(plan.scores, composed, samples)}
        if self._constraint is not None:
            figures["lambda"] = self._constraint.multiplier
        if self._baseline is not None:
            figures["baseline"] = plan.baseline
        for name, component in self._reward.components.items():
            if component.schedule is not None:
                figures[f"{name}_weight"] = component.weight_at(plan.step)
        return figures

    def evaluation_metrics(self, samples: pa.Table) -> dict[str, float]:
        """Return the same figures of held-out samples, scored as the last step was; nothing is remembered."""
        check(samples, SAMPLES, "learner, evaluation")
        composed = self._composer.compose(samples, step=self._step, update=False)
        return self._figures(self._scores(composed)[identity_order(samples)], composed, samples)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, JSON-able; floats survive JSON exactly."""
        state = {"step": self._step, "kl": self._kl.state_dict(), "reward": self._composer.state_dict()}
        if self._constraint is not None:
            state["constraint"] = self._constraint.state_dict()
        if self._baseline is not None:
            state["baseline"] = self._baseline.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`'s result."""
        self._step = state["step"]
        self._kl.load_state_dict(state["kl"])
        self._composer.load_state_dict(state["reward"])
        if self._constraint is not None:
            self._constraint.load_state_dict(state["constraint"])
        if self._baseline is not None:
            self._baseline.load_state_dict(state["baseline"])

    def _scores(self, composed: Composed) -> np.ndarray:
        if self._constraint is None:
            return composed.scores
        return self._constraint.combined(composed.scores, composed.costs)

    def _figures(self, scores: np.ndarray, composed: Composed, samples: pa.Table) -> dict[str, float]:
        figures = _figures(scores, composed, samples)
        if self._constraint is not None:
            costs = composed.costs[identity_order(samples)]
            known = costs[~np.isnan(costs)]
            figures["cost_mean"] = float(known.mean()) if known.size else math.nan
        return figures

    def _check_kl(self, step: int, samples: pa.Table) -> None:
        num_null = samples["kl"].null_count
        if self._kl.coef > 0 and num_null and not self._has_own_reference:
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
