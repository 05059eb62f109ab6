"""Composes what the judges said into one score per sample: normalise, weight, add, clip, penalise.

Judges are stateless and record raw components; everything with memory is here, in the learner's checkpoint.  A
component that does not apply to a sample is absent from its map: it is left out of the sum and counted.  Costs are
added apart, and no part of the score.

    accuracy 2.0 (weight 1), style -0.5 (weight 0.2), clip 1, penalty 0.5, cut off at the length limit:
    2.0 - 0.1 = 1.9 -> 1.0 -> 0.5
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from learner.batch import identity_order

if TYPE_CHECKING:
    from learner.penalties import Penalties
    from reward.config import RewardConfig

NORMALIZE_EPS = 1e-8
"""Added to a variance, so that a constant component normalises to 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of all values so far.

    Source:
        Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def merged(self, values: np.ndarray) -> "RunningMoments":
        """Return the moments after `values` ([N] float64) as well."""
        if values.size == 0:
            return self
        count, mean = self.count + values.size, float(values.mean())
        squares, delta = float(np.square(values - mean).sum()), mean - self.mean
        return RunningMoments(
            count=count,
            mean=self.mean + delta * values.size / count,
            squares=self.squares + squares + delta * delta * self.count * values.size / count,
        )

    def standardized(self, values: np.ndarray) -> np.ndarray:
        """Return (values - mean) / sqrt(variance + eps), with the variance of the population."""
        if self.count == 0:
            return values
        return (values - self.mean) / math.sqrt(self.squares / self.count + NORMALIZE_EPS)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Composed:
    """The scores of a batch, and what its raw components looked like."""

    scores: np.ndarray
    """[B] float64, in the row order of the samples; costs are no part of them."""
    costs: np.ndarray
    """[B] float64, likewise: weighted sums of the costs that apply; NaN where none does."""
    num_absent: dict[str, int]
    """Samples that each component did not apply to."""
    means: dict[str, float]
    """Of each raw component, over the samples it applied to; NaN where there is none."""
    stds: dict[str, float]
    """Population standard deviations, likewise."""


class RewardComposer:
    """Turns components into scores, and remembers the running moments that normalisation needs."""

    def __init__(self, reward: "RewardConfig", penalties: "Penalties") -> None:
        self._reward = reward
        self._penalties = penalties
        normalized = [name for name, judge in reward.components.items() if judge.normalize == "running"]
        self._moments = {name: RunningMoments() for name in normalized}

    def compose(self, samples: pa.Table, *, step: int, update: bool = True) -> Composed:
        """Score a batch.

        Running moments take the batch in, in the order of its identities, before they are used; so the first batch is
        already normalised, and the result does not depend on the order of arrival.

        Args:
            samples: SAMPLES, rows in any order.
            step: Whose weights are used.
            update: False only looks: nothing is remembered, and moments that have seen nothing yet normalise the batch
                by itself.

        Raises:
            ValueError: on a component that is not finite or not configured, or a sample without any, naming the sample.
        """
        order = identity_order(samples)
        ordered = samples.take(pa.array(order))
        components = component_matrix(ordered, tuple(self._reward.components))
        moments = {name: self._seen(name, components[name], update) for name in self._moments}
        normalized = {name: seen.standardized(components[name]) for name, seen in moments.items()}
        total = self._weighted_sum({**components, **normalized}, role="reward", step=step)
        if self._reward.clip is not None:
            total = np.clip(total, -self._reward.clip, self._reward.clip)
        scores, costs = np.empty(len(order)), np.empty(len(order))
        scores[order] = total - self._penalties.of_samples(ordered)
        costs[order] = self._costs(components, step=step)
        if update:
            self._moments = moments
        return _composed(scores, costs, components)

    def state_dict(self) -> dict[str, Any]:
        """Return the running moments, JSON-able."""
        return {
            name: {"count": moments.count, "mean": moments.mean, "squares": moments.squares}
            for name, moments in self._moments.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`'s result.

        Raises:
            ValueError: if it belongs to other components.
        """
        if set(state) != set(self._moments):
            raise ValueError(
                f"running moments must be of {sorted(self._moments)}, got {sorted(state)}; resume with the run's own "
                "reward.components"
            )
        self._moments = {name: RunningMoments(**state[name]) for name in self._moments}

    def _weighted_sum(self, values: Mapping[str, np.ndarray], *, role: str, step: int) -> np.ndarray:
        """Return the sum of the components of a role, absent ones as 0."""
        total = np.zeros(len(next(iter(values.values()))))
        for name, judge in self._reward.components.items():
            if judge.role == role:
                total += judge.weight_at(step) * np.where(np.isnan(values[name]), 0.0, values[name])
        return total

    def _costs(self, components: Mapping[str, np.ndarray], *, step: int) -> np.ndarray:
        names = [name for name, judge in self._reward.components.items() if judge.role == "cost"]
        total = self._weighted_sum(components, role="cost", step=step)
        applies = np.array([~np.isnan(components[name]) for name in names], dtype=bool).reshape(len(names), len(total))
        return np.where(applies.any(axis=0), total, np.nan)

    def _seen(self, name: str, values: np.ndarray, update: bool) -> RunningMoments:
        before = self._moments[name]
        return before.merged(values[~np.isnan(values)]) if update or before.count == 0 else before


def component_matrix(samples: pa.Table, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return each component as [B] float64, NaN where it is absent.

    Raises:
        ValueError: see `RewardComposer.compose`.
    """
    matrix = {name: np.full(samples.num_rows, np.nan) for name in names}
    columns = (samples[name].to_pylist() for name in ("group_id", "sample_index", "components"))
    for row, (group_id, index, components) in enumerate(zip(*columns, strict=True)):
        where = f"group {group_id!r}, sample {index}"
        if not components:
            raise ValueError(
                f"a sample must have at least one component, got none ({where}); let one judge always apply"
            )
        for name, value in components:
            if name not in matrix:
                raise ValueError(f"a component must be one of {sorted(names)}, got {name!r} ({where})")
            if value is None or not math.isfinite(value):
                raise ValueError(f"component {name!r} must be finite, got {value} ({where}); mend its judge")
            matrix[name][row] = value
    return matrix


def _composed(scores: np.ndarray, costs: np.ndarray, components: Mapping[str, np.ndarray]) -> Composed:
    present = {name: values[~np.isnan(values)] for name, values in components.items()}
    return Composed(
        scores=scores,
        costs=costs,
        num_absent={name: len(scores) - values.size for name, values in present.items()},
        means={name: float(values.mean()) if values.size else math.nan for name, values in present.items()},
        stds={name: float(values.std()) if values.size else math.nan for name, values in present.items()},
    )
