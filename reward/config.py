"""Configuration of the reward room: judges, their weights, the reference policy."""

import os
import re
from typing import Any, Literal

from pydantic import Field, model_validator

from actors.config import Config, Strings
from reward.credit_config import CreditConfig

RESERVED_NAMES = frozenset({"score", "return", "advantage", "response_length"})
"""Metrics called `<name>_mean` or `<name>_std` that are not a component's."""


_NAME = re.compile(r"[A-Za-z_]\w*")
_OF_A_MODEL = ("ensemble", "input", "max_tokens")


class WeightScheduleConfig(Config):
    """A component's weight moves in a straight line from `weight` to `final_weight`, and stays there."""

    final_weight: float
    """Weight from step `end_step` on."""
    start_step: int = Field(default=1, ge=1)
    """Last step with the first weight."""
    end_step: int = Field(ge=2)
    """First step with the final weight."""

    @model_validator(mode="after")
    def _has_a_length(self) -> "WeightScheduleConfig":
        if self.end_step <= self.start_step:
            raise ValueError(
                f"end_step must be greater than start_step = {self.start_step}, got {self.end_step}; give the change "
                "at least one step"
            )
        return self


class ConstraintConfig(Config):
    """Keep the mean cost at or below a limit by a Lagrange multiplier (Safe-RLHF, Dai et al. 2023).

    What is learnt is (R - lambda C) / (1 + lambda): R the composed score, C the weighted sum of the components of role
    cost.  After each step log(lambda) moves by learning_rate * lambda * (mean cost - limit).
    """

    limit: float = 0.0
    """The mean cost of a response must not be above this; 0 is the boundary of a cost model."""
    initial_lambda: float = Field(default=1.0, gt=0)
    """The multiplier at first."""
    min_lambda: float = Field(default=1e-4, gt=0)
    """The multiplier at least; at 0 it could never grow again."""
    max_lambda: float = Field(default=100.0, gt=0)
    """The multiplier at most; it grows without end while a limit cannot be kept."""
    learning_rate: float = Field(default=0.1, gt=0)
    """Of log(lambda)."""
    window: int = Field(default=128, ge=1)
    """The mean cost is taken over so many recent sequences, and at least over all of the last step."""
    delay_steps: int = Field(default=0, ge=0)
    """Steps before the multiplier moves; the window fills meanwhile."""

    @model_validator(mode="after")
    def _starts_within_its_bounds(self) -> "ConstraintConfig":
        if not self.min_lambda <= self.initial_lambda <= self.max_lambda:
            raise ValueError(
                f"initial_lambda must be between min_lambda = {self.min_lambda} and max_lambda = {self.max_lambda}, "
                f"got {self.initial_lambda}; move one of them"
            )
        return self


class ComponentConfig(Config):
    """One judge: a reward model or a rule function, with its weight in the composed score."""

    model: str | None = None
    """Directory of a reward model trained by `concord reward`, or a Hugging Face sequence-classification model."""
    ensemble: Strings = ()
    """Directories of more reward models beside `model`: the component is their mean, `score_std` their deviation."""
    function: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")
    """`package.module:name` of `f(prompts, completions, **columns) -> list[float | None]` (TRL's signature)."""
    arguments: dict[str, Any] = {}
    """Extra keyword arguments of the function."""
    role: Literal["reward", "cost"] = "reward"
    """reward: a part of the composed score; cost: never a part of it, held down by `constraint`."""
    weight: float = 1.0
    """Factor of this component in the composed score, or in the cost."""
    schedule: WeightScheduleConfig | None = None
    """Move the weight in the course of the run."""
    normalize: Literal["none", "running"] = "none"
    """running: subtract the running mean and divide by the running standard deviation before weighting."""
    input: Literal["response", "prompt_response"] = "prompt_response"
    """Which text a reward model reads."""
    max_tokens: int = Field(default=512, ge=8)
    """Longest text a reward model reads, its own tokens; longer texts keep their end."""

    @model_validator(mode="after")
    def _one_judge(self) -> "ComponentConfig":
        if (self.model is None) == (self.function is None):
            raise ValueError("exactly one of `model` and `function` must be set")
        if self.model is not None and self.arguments:
            raise ValueError("`arguments` belongs to a function; remove it or set `function` instead of `model`")
        # Compared with the defaults, not with what was written: a saved configuration spells out every field.
        ignored = [name for name in _OF_A_MODEL if getattr(self, name) != type(self).model_fields[name].default]
        if self.function is not None and ignored:
            raise ValueError(f"`{ignored[0]}` belongs to a model; remove it or set `model` instead of `function`")
        return self

    @model_validator(mode="after")
    def _cost_keeps_its_scale(self) -> "ComponentConfig":
        if self.role == "cost" and self.normalize != "none":
            raise ValueError(
                f"`normalize` must be none with role cost, got {self.normalize}; a shifted cost has lost its boundary"
            )
        if self.role == "cost" and self.schedule is not None:
            raise ValueError("`schedule` must be left out with role cost: the limit is in units of the weighted cost")
        return self

    def weight_at(self, step: int) -> float:
        """Return the weight in a step, which counts from 1; in 0, before training, it is the first weight."""
        if self.schedule is None:
            return self.weight
        start, end, final = self.schedule.start_step, self.schedule.end_step, self.schedule.final_weight
        progress = min(max((step - start) / (end - start), 0.0), 1.0)
        return (1.0 - progress) * self.weight + progress * final


class RewardConfig(Config):
    """Who judges the responses."""

    components: dict[str, ComponentConfig] = Field(min_length=1)
    """Judges by name, which begins their metrics' names; the composed score is their weighted sum."""
    num_workers: int = Field(default=1, ge=1)
    """Judging replicas, each one process with all judges and the reference policy."""
    clip: float | None = Field(default=None, gt=0)
    """Clip the composed score to [-clip, clip]; penalties are subtracted after, and the cost is not clipped."""
    constraint: ConstraintConfig | None = None
    """Limit of the mean cost; goes with components of role cost."""
    credit: CreditConfig | None = None
    """Spread the score over the response's tokens; without it, it is on the last one."""

    @model_validator(mode="after")
    def _names_are_metric_names(self) -> "RewardConfig":
        for name in self.components:
            if not _NAME.fullmatch(name) or name.startswith("eval_"):
                raise ValueError(
                    "component names must be letters, digits and underscores, begin with no digit and not with eval_, "
                    f"got {name!r:.80}; they become names of metrics"
                )
        taken = sorted(RESERVED_NAMES & set(self.components))
        if taken:
            raise ValueError(f"components must not be named {taken}; metrics of these names exist already")
        return self

    @model_validator(mode="after")
    def _costs_have_a_limit(self) -> "RewardConfig":
        roles = {component.role for component in self.components.values()}
        if "reward" not in roles:
            raise ValueError("components must hold one of role reward, got costs only; add a reward")
        if ("cost" in roles) != (self.constraint is not None):
            raise ValueError(
                "`constraint` must be set with components of role cost, and only then: neither does anything without "
                "the other"
            )
        if self.constraint is not None and "cost" in self.components:
            raise ValueError("components must not be named ['cost'] with a constraint; cost_mean is the weighted sum")
        return self

    @model_validator(mode="after")
    def _credit_has_a_judge(self) -> "RewardConfig":
        if self.credit is None:
            return self
        component = self.components.get(self.credit.component)
        if component is None:
            raise ValueError(
                f"credit.component must be one of {sorted(self.components)}, got {self.credit.component!r:.80}"
            )
        if self.credit.kind == "attention" and component.model is None:
            raise ValueError(
                f"credit.component must be a model with kind attention, got the function {self.credit.component!r}; "
                "name a model or set kind potential"
            )
        return self

    def with_absolute_paths(self) -> "RewardConfig":
        """Return the section with local model directories made absolute: workers may start in another directory."""
        components = {name: _with_absolute_paths(component) for name, component in self.components.items()}
        return self.model_copy(update={"components": components})


def _with_absolute_paths(component: ComponentConfig) -> ComponentConfig:
    def absolute(path: str) -> str:
        return os.path.abspath(path) if os.path.isdir(path) else path

    model = component.model and absolute(component.model)
    return component.model_copy(update={"model": model, "ensemble": tuple(map(absolute, component.ensemble))})
