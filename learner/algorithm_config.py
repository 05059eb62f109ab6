"""Configuration of the algorithm: a preset's name, and one field for each part that can be replaced."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from actors.config import Config
from learner.parts import ADVANTAGES, POLICY_LOSSES, is_plugin
from learner.presets import ONLINE

_Band = tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]]


class KLConfig(Config):
    """Penalty for leaving the reference policy."""

    coef: float = Field(default=0.05, ge=0)
    """beta; with the adaptive controller its first value."""
    placement: Literal["reward", "loss"] = "reward"
    """reward: a part of each token's reward (Ziegler et al. 2019, Eq. 2); loss: a term of the loss (GRPO)."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Of the penalty (Schulman 2020). In a loss only k2 has the gradient of KL(policy || reference), k3 has that of
    KL(reference || policy), and k1 needs `importance_weighted`."""
    importance_weighted: bool = False
    """In a loss: multiply by the ratio to the old policy (for k1 and k3 with its gradient) and by off_policy's weight;
    all three then have the gradient of KL(policy || reference), off-policy too (DeepSeek-V3.2, 2512.02556)."""
    controller: Literal["fixed", "adaptive"] = "fixed"
    """adaptive: Ziegler et al. 2019, section 2.2."""
    target: float | None = Field(default=None, gt=0)
    """Adaptive: KL to settle at, nats per sequence."""
    horizon: int | None = Field(default=None, ge=1)
    """Adaptive: sequences over which the coefficient may change by a factor e^0.2 or so."""

    @model_validator(mode="after")
    def _adaptive_settings(self) -> "KLConfig":
        adaptive = self.controller == "adaptive"
        if adaptive != (self.target is not None) or adaptive != (self.horizon is not None):
            raise ValueError("`target` and `horizon` must both be set with controller adaptive, and only then")
        if adaptive and self.coef == 0:
            raise ValueError(
                f"coef must be greater than 0 with controller adaptive, got {self.coef}, which no factor would change; "
                "give its first value or set controller fixed"
            )
        return self

    @model_validator(mode="after")
    def _estimator_has_a_gradient(self) -> "KLConfig":
        if self.placement == "reward" and (self.estimator != "k1" or self.importance_weighted):
            raise ValueError(
                "`estimator` must be k1 and `importance_weighted` false with placement reward: the policy gradient of "
                "that penalty is the gradient of the KL; set placement loss to use another"
            )
        if self.placement == "loss" and self.estimator == "k1" and not self.importance_weighted:
            raise ValueError(
                "`estimator` must be k2 or k3 with placement loss, got k1, whose gradient is 0 on average; or set "
                "importance_weighted true"
            )
        return self


class ReferenceConfig(Config):
    """Which policy the KL penalty is measured from."""

    mode: Literal["fixed", "base", "swap", "ema"] = "fixed"
    """fixed: the policy that the run started with; base: the same, as the trained policy without its adapters, so that
    nobody holds it a second time (learner.lora); swap: the current policy, taken every so many steps; ema: an
    exponential moving average of the policy's weights."""
    every: int | None = Field(default=None, ge=1)
    """swap: steps between two swaps; one that is due in a skipped step is left out."""
    decay: float | None = Field(default=None, ge=0, lt=1)
    """ema: share of the old reference that a step keeps."""

    @model_validator(mode="after")
    def _settings_of_the_mode(self) -> "ReferenceConfig":
        if (self.mode == "swap") != (self.every is not None):
            raise ValueError("`every` must be set with mode swap, and only then")
        if (self.mode == "ema") != (self.decay is not None):
            raise ValueError("`decay` must be set with mode ema, and only then")
        return self


class OffPolicyConfig(Config):
    """Three policies: the one that sampled (recorded), the one at the start of the step (old), the current one."""

    old_logprobs: Literal["auto", "recorded", "recomputed"] = "auto"
    """recorded: the sampling policy stands for the old one; recomputed: the learner computes the old log-probs, at the
    cost of a forward pass (decoupled PPO); auto: recorded in float32 without staleness, else recomputed."""
    weight: Literal["none", "token", "sequence"] = "token"
    """Importance weight of a token's loss: none, old / recorded of the token, or of its whole sequence."""
    max_weight: float | None = Field(default=2.0, gt=0)
    """Truncation of the weight (Yao et al. 2025); null = none, as in decoupled PPO."""
    mask: Literal["none", "token", "sequence"] = "none"
    """Leave out tokens whose ratio old / recorded is outside mask_range (IcePop), or sequences whose geometric mean
    ratio is."""
    mask_range: _Band | None = Field(default=None, strict=False)
    """Lower and upper bound; IcePop uses 0.5 and 5, a geometric mask 0.999 and 1.001."""

    @model_validator(mode="after")
    def _mask_range_goes_with_a_mask(self) -> "OffPolicyConfig":
        if (self.mask == "none") == (self.mask_range is not None):
            raise ValueError("`mask_range` must be set with a mask, and only then")
        if self.mask_range is not None and self.mask_range[0] >= self.mask_range[1]:
            raise ValueError(f"mask_range must be a lower and a larger upper bound, got {list(self.mask_range)}")
        if self.weight == "none" and self.max_weight != type(self).model_fields["max_weight"].default:
            raise ValueError("`max_weight` must be left out with weight none, where it would be ignored")
        return self


class DynamicSamplingConfig(Config):
    """Leave out groups whose samples are all alike, and draw other prompts in their places (DAPO)."""

    max_waves: int = Field(default=3, ge=2)
    """Waves of prompts in one step, the first one included; what is missing then is filled with alike groups."""
    component: str | None = None
    """The component that must differ between a group's samples; null = any of them."""


class AlgorithmConfig(Config):
    """How scores become a loss. `algorithm: NAME` takes a preset; each part can be set apart.

    Without a name it is PPO (Schulman et al. 2017).
    """

    name: str = "ppo"
    """Preset, one of `docs/algorithms.md`: it gives the other fields their values where they are not set."""
    advantage: str = "gae"
    """gae | n_step | vtrace (with values), returns (minus `baseline`), leave_one_out | group (relative to the other
    answers to the prompt), or `module:function` of your own."""
    baseline: Literal["none", "batch_mean", "group_mean", "ema"] = "none"
    """Advantage returns: what is subtracted."""
    baseline_decay: float = Field(default=0.9, ge=0, lt=1)
    """Baseline ema: share of the old average that a step keeps."""
    scale_by_std: bool = True
    """Advantage group: divide by the standard deviation of the group's scores."""
    n_step: int = Field(default=1, ge=1)
    """Advantage n_step: rewards before the value; 1 = temporal difference."""
    vtrace_rho: float = Field(default=1.0, gt=0)
    """Advantage vtrace: truncation of the importance weights of the temporal differences."""
    vtrace_c: float = Field(default=1.0, gt=0)
    """Advantage vtrace: truncation of the trace."""
    policy_loss: str = "ppo_clip"
    """policy_gradient | ppo_clip | cispo, or `module:function` of your own."""
    ratio: Literal["token", "sequence", "sequence_mean"] = "token"
    """ppo_clip: probability ratio of a token, of its sequence, or the sequence's geometric mean (GSPO)."""
    clip_range: float = Field(default=0.2, gt=0)
    """Lower and, unless set apart, upper clip of the probability ratio."""
    clip_range_high: float | None = Field(default=None, gt=0)
    """Upper clip (clip-higher, DAPO)."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound of the loss for negative advantages (Ye et al. 2019)."""
    target_kl: float | None = Field(default=None, gt=0)
    """Leave out the rest of a step's updates once one has measured an approximate KL(old || current) above this, nats
    per token."""
    value_clip_range: float | None = Field(default=0.2, gt=0)
    """Clip of the value function's change; null = off."""
    value_coef: float = Field(default=0.1, ge=0)
    """Weight of the value loss."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """GAE's lambda."""
    whiten_advantages: bool = True
    """Give the batch's advantages mean 0 and variance 1, over all its tokens."""
    aggregation: Literal[
        "token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "sequence_mean_token_sum_norm"
    ] = "token_mean"
    """How token losses become one number; token_mean divides by the minibatch's global token count, the last one is a
    sum divided by rollouts.max_new_tokens (Dr.GRPO)."""
    kl: KLConfig = KLConfig()
    """Penalty for leaving the reference policy."""
    reference: ReferenceConfig = ReferenceConfig()
    """The policy that the penalty is measured from."""
    off_policy: OffPolicyConfig = OffPolicyConfig()
    """Correction for samples of another policy than the old one."""
    dynamic_sampling: DynamicSamplingConfig | None = None
    """Replace groups without contrast."""
    missing_eos_penalty: float | None = Field(default=None, gt=0)
    """Subtracted from the score of a response that hit the length limit, which is then terminal; without it such a
    response bootstraps from its last state's value."""
    overlong_buffer: float | None = Field(default=None, gt=0, le=1)
    """Soft overlong penalty (DAPO, Eq. 13): the score falls in the last part of rollouts.max_new_tokens, this share."""
    overlong_coef: float = Field(default=1.0, gt=0)
    """Soft overlong penalty at the limit."""
    length_coef: float = Field(default=0.0, ge=0)
    """Subtracted from the score for each response token."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        """Put a preset's settings under those that are given."""
        if isinstance(given, str):
            given = {"name": given}
        if not isinstance(given, Mapping):
            return given
        name = given.get("name", "ppo")
        if not isinstance(name, str) or name not in ONLINE:
            raise ValueError(f"name must be one of {', '.join(ONLINE)}, got {name!r}; `concord offline` has the others")
        return _merged(ONLINE[name].settings, given)

    @model_validator(mode="after")
    def _parts_exist(self) -> "AlgorithmConfig":
        for field, known in (("advantage", ADVANTAGES), ("policy_loss", POLICY_LOSSES)):
            value = getattr(self, field)
            if value not in known and not is_plugin(value):
                raise ValueError(f"{field} must be one of {', '.join(known)} or module:function, got {value!r}")
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "AlgorithmConfig":
        own_advantage = is_plugin(self.advantage)
        for field, is_used, by in self._uses():
            value, default = getattr(self, field), type(self).model_fields[field].default
            if not is_used and value != default:
                raise ValueError(
                    f"{field} must be left out or {default!r}, got {value!r}: it belongs to {by}, and this is "
                    f"{self.name} with advantage {self.advantage} and policy_loss {self.policy_loss}"
                )
        if self.kl.coef == 0 and self.reference.mode != "fixed":
            raise ValueError(
                f"reference.mode must be fixed with kl.coef 0, where nothing is measured from the reference, got "
                f"{self.reference.mode}"
            )
        is_shared = self.compares_group or own_advantage
        if self.policy_loss == "ppo_clip" and self.ratio != "token" and not is_shared:
            raise ValueError(
                f"ratio must be token with advantage {self.advantage}, got {self.ratio}: a sequence's ratio needs one "
                "advantage for the sequence (leave_one_out, group)"
            )
        return self

    @model_validator(mode="after")
    def _corrections_have_something_to_correct(self) -> "AlgorithmConfig":
        if self.advantage == "vtrace" and self.off_policy.weight != "none":
            raise ValueError("off_policy.weight must be none with advantage vtrace, which weighs by itself")
        if self.corrections and self.off_policy.old_logprobs == "recorded":
            raise ValueError(
                f"{self.corrections} must be left out with off_policy.old_logprobs recorded, where every ratio "
                "old / recorded is 1; set old_logprobs recomputed"
            )
        return self

    @property
    def needs_values(self) -> bool:
        """Whether a value function is trained; with an advantage of one's own, whether the preset trains one."""
        if self.advantage in ADVANTAGES:
            return ADVANTAGES[self.advantage].has_values
        return ADVANTAGES[ONLINE[self.name].settings.get("advantage", "gae")].has_values and self.value_coef > 0

    @property
    def corrections(self) -> str:
        """The setting that was made to correct for another sampling policy; empty where there is none."""
        settings = self.off_policy
        if self.advantage == "vtrace":
            return "advantage vtrace"
        if settings.mask != "none":
            return "off_policy.mask"
        if settings.weight == "sequence":
            return "off_policy.weight sequence"
        is_changed = settings.max_weight != type(settings).model_fields["max_weight"].default
        return "off_policy.max_weight" if is_changed else ""

    @property
    def compares_group(self) -> bool:
        """Whether all tokens of a response have one advantage, relative to the other answers to its prompt."""
        return self.advantage in ADVANTAGES and ADVANTAGES[self.advantage].compares_group

    def _uses(self) -> list[tuple[str, bool, str]]:
        """Return (setting, whether anything reads it, who would); plug-ins may read all."""
        estimator, loss = self.advantage, self.policy_loss
        own, own_loss = is_plugin(estimator), is_plugin(loss)
        return [
            ("baseline", own or estimator == "returns", "advantage returns"),
            ("baseline_decay", self.baseline == "ema", "baseline ema"),
            ("scale_by_std", own or estimator == "group", "advantage group"),
            ("n_step", own or estimator == "n_step", "advantage n_step"),
            ("vtrace_rho", own or estimator == "vtrace", "advantage vtrace"),
            ("vtrace_c", own or estimator == "vtrace", "advantage vtrace"),
            ("gae_lambda", own or estimator in ("gae", "vtrace"), "advantage gae and vtrace"),
            ("gamma", own or ADVANTAGES[estimator].is_discounted, "advantages of single tokens"),
            ("ratio", own_loss or loss == "ppo_clip", "policy_loss ppo_clip"),
            ("dual_clip", own_loss or loss == "ppo_clip", "policy_loss ppo_clip"),
            ("clip_range", own_loss or loss != "policy_gradient", "policy_loss ppo_clip and cispo"),
            ("clip_range_high", own_loss or loss != "policy_gradient", "policy_loss ppo_clip and cispo"),
            ("value_clip_range", self.needs_values or self.value_clip_range is None, "advantages with values"),
            ("value_coef", own or self.needs_values, "advantages with values"),
            ("overlong_coef", self.overlong_buffer is not None, "overlong_buffer"),
        ]


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `under` with `over` on top; sections are merged, so that one of their fields can be set alone."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged
