"""Configuration of `concord offline`: data that is there already, an offline algorithm, an evaluation.  No torch."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from actors.config import Config, PolicyConfig, PromptsConfig
from learner.config import DataConfig, TrainingConfig
from learner.presets import OFFLINE
from learner.value_config import ILQLConfig, QLearningConfig
from reward.config import RewardConfig


class DPOConfig(Config):
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290) from pairs."""

    name: Literal["dpo"] = "dpo"
    """Algorithm."""
    beta: float = Field(default=0.1, gt=0)
    """Weight of the KL penalty in the objective whose optimum the loss has: small = far from the starting policy."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of preferences that are taken to be the wrong way round (conservative DPO)."""
    sft_coef: float = Field(default=0.0, ge=0)
    """Weight of -log p(chosen), mean over its tokens: DPO alone lowers both responses, and what neither of them is gets
    likelier (Pang et al. 2024, arXiv 2404.19733, Eq. 1); 0 = the paper's DPO."""
    pairs_per_prompt: int | None = Field(default=16, ge=1)
    """Ratings and rollouts: pairs made for each prompt, drawn by seed from all its samples with different scores;
    null = all of them."""


def _named(value: Any) -> Any:
    """Make a section of an algorithm's bare name, put its preset under it, and refuse an unknown one."""
    if isinstance(value, DPOConfig | ILQLConfig | QLearningConfig):
        return value
    section = {"name": value} if isinstance(value, str) else value
    if not isinstance(section, Mapping):
        raise ValueError(f"an algorithm must be a name or a section, got {value!r:.80}; write for instance dpo")
    name = section.get("name", "dpo")
    if name not in OFFLINE:
        raise ValueError(f"name must be one of {', '.join(OFFLINE)}, got {name!r}; `concord train` has the others")
    return {**OFFLINE[name].settings, "name": name, **section}


def _class_name(value: Any) -> str:
    """Return which class a section is of; errors leave names that end in Config out of a setting's path."""
    name = value["name"] if isinstance(value, Mapping) else value.name
    return {"dpo": "DPOConfig", "ilql": "ILQLConfig", "q_learning": "QLearningConfig"}[name]


OfflineAlgorithm = Annotated[
    Annotated[DPOConfig, Tag("DPOConfig")]
    | Annotated[ILQLConfig, Tag("ILQLConfig")]
    | Annotated[QLearningConfig, Tag("QLearningConfig")],
    Discriminator(_class_name),
    BeforeValidator(_named),
]
"""An algorithm by its name, or its name and settings."""


class ScoreConfig(Config):
    """What a response is worth."""

    weights: dict[str, float] = {}
    """Rollouts: factor of a judge's component in the score; 1 for those not named, 0 leaves one out."""
    missing_eos_penalty: float | None = Field(default=None, gt=0)
    """Rollouts: subtracted from the score of a response that hit the length limit, which is then terminal; without it
    such a response has no known end, and values are bootstrapped after it."""
    standardize: bool = False
    """Value-based algorithms: give the scores of ratings or rollouts mean 0 and standard deviation 1."""


class OfflineEvaluationConfig(Config):
    """Sample the trained policy on held-out prompts and let judges score it."""

    prompts: PromptsConfig
    """Held-out prompts."""
    reward: RewardConfig
    """The judges."""
    num_prompts: int = Field(default=64, ge=1)
    """How many prompts, the first ones of the source."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses per prompt."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest response, tokens."""
    temperature: float = Field(default=1.0, ge=0)
    """0 = greedy; `kl` is estimated on these samples, so it is only a KL at temperature 1."""
    max_rows: int = Field(default=32, ge=4, multiple_of=4)
    """Samples decoded together."""
    seed: int = 0
    """Of the evaluation's random numbers."""

    @model_validator(mode="after")
    def _judges_only_look(self) -> "OfflineEvaluationConfig":
        reward, components = self.reward, self.reward.components
        learning = [name for name in ("constraint", "credit") if getattr(reward, name) is not None]
        learning += ["num_workers"] if reward.num_workers != 1 else []
        learning += [f"components.{name}.schedule" for name, judge in components.items() if judge.schedule is not None]
        learning += [f"components.{name}.normalize" for name, judge in components.items() if judge.normalize != "none"]
        if learning:
            raise ValueError(
                f"reward.{learning[0]} must be left out of an evaluation, where nothing is learnt from the scores; "
                "name the judges and their weights"
            )
        return self


class OfflineConfig(Config):
    """`concord offline`: learn from preferences, ratings, or the rollouts of earlier runs; nothing is sampled."""

    output: str
    """Directory for the trained model, its metrics and its resolved configuration."""
    policy: PolicyConfig
    """The model to start from; a supervised start is trained first, once, and is DPO's reference policy."""
    data: DataConfig
    """Rows with `prompt`, `chosen`, `rejected`; or with `prompt`, `completion`, `rating`; or a run's `rollouts`."""
    score: ScoreConfig = ScoreConfig()
    """What a response is worth."""
    algorithm: OfflineAlgorithm = DPOConfig()
    """dpo, ilql or q_learning."""
    training: TrainingConfig = TrainingConfig()
    """The loop."""
    evaluation: OfflineEvaluationConfig | None = None
    """What to measure after training; null = nothing."""

    @model_validator(mode="after")
    def _targets_are_whole(self) -> "OfflineConfig":
        engine = self.training.engine
        if not isinstance(self.algorithm, DPOConfig) and engine.backend == "zero" and engine.zero_stage == 3:
            raise ValueError(
                "training.engine.zero_stage must be at most 2 with algorithm ilql or q_learning, got 3: target heads "
                "follow whole parameters; lower it"
            )
        return self

    @model_validator(mode="after")
    def _scores_are_used(self) -> "OfflineConfig":
        if self.score.standardize and isinstance(self.algorithm, DPOConfig):
            raise ValueError(
                "score.standardize must be false with algorithm dpo, which only compares scores; remove it"
            )
        return self
