"""Configuration of the reward room: judges, their weights, the reference policy."""

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from actors.config import Config, Strings

RESERVED_NAMES = frozenset({"score", "return", "advantage", "response_length"})
"""Metrics called `<name>_mean` or `<name>_std` that are not a component's."""


_NAME = re.compile(r"[A-Za-z_]\w*")
_OF_A_MODEL = ("ensemble", "input", "max_tokens")


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
    weight: float = 1.0
    """Factor of this component in the composed score."""
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


class RewardConfig(Config):
    """Who judges the responses."""

    components: dict[str, ComponentConfig] = Field(min_length=1)
    """Judges by name, which begins their metrics' names; the composed score is their weighted sum."""
    num_workers: int = Field(default=1, ge=1)
    """Judging replicas, each one process with all judges and the reference policy."""
    clip: float | None = Field(default=None, gt=0)
    """Clip the composed score to [-clip, clip]."""

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
