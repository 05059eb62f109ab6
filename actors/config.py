"""Configuration of the actors' room: policy, prompts, rollouts, evaluation prompts.

Imports nothing heavier than pydantic, so that a wrong setting is reported before torch is loaded.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Config(BaseModel):
    """Base of every section: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


Strings = Annotated[tuple[str, ...], Field(strict=False)]
"""A YAML list of strings."""


class FunctionConfig(Config):
    """A Python function by import path, with keyword arguments."""

    function: str = Field(pattern=r"^[\w.]+:\w+$")
    """`package.module:name`; importable from the working directory."""
    arguments: dict[str, Any] = {}
    """Keyword arguments."""


class CharacterTokenizerConfig(Config):
    """A tokenizer with one token per character, for toy tasks; adds `<pad>` and `<eos>`."""

    characters: str = Field(min_length=1)
    """The alphabet, in id order; `<pad>` and `<eos>` follow."""


class ArchitectureConfig(Config):
    """A model with random weights, for tests and toy tasks."""

    architecture: dict[str, Any]
    """A Hugging Face model configuration; must have `model_type`."""
    tokenizer: str | CharacterTokenizerConfig
    """Path of a tokenizer, or a character alphabet."""


class StartConfig(Config):
    """A supervised start that is trained once and cached by content."""

    config: str
    """Path of the SFT YAML; like every path, relative to the working directory."""
    set: dict[str, Any] = {}
    """Overrides for that YAML, nested like it."""


class PolicyConfig(Config):
    """The network that is trained."""

    model: str | ArchitectureConfig
    """Path or hub name of a Hugging Face decoder, or an architecture with random weights."""
    start: StartConfig | None = None
    """Supervised start to run first; its result becomes policy and reference."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the engine's weights and the forward passes; auto = bfloat16 on a GPU, float32 on a CPU."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Leave off for anything you have not read."""
    pack_weights: bool = True
    """On a CPU, bring weights into the order that float32 products read fastest: less time in rollout and reward
    workers; a rollout worker needs memory for its weights twice."""


class PromptsConfig(Config):
    """Where prompts come from and in which order they are drawn."""

    path: str | None = None
    """A JSONL or Parquet file, or a directory of either; a path or an fsspec URL."""
    make: FunctionConfig | None = None
    """A function `f(directory, **arguments)` that writes such files; run once and cached by content."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longer prompts are quarantined, tokens; null = what the policy's positions leave beside a response."""
    strict: bool = False
    """Scan all rows first and make a malformed one an error, instead of quarantining it when drawn."""
    shuffle: bool = True
    """Draw in a seeded random order, another one each epoch."""
    shuffle_window: int = Field(default=4096, ge=1)
    """Rows held in memory while shuffling; row groups are permuted as well."""

    @model_validator(mode="after")
    def _one_source(self) -> "PromptsConfig":
        if (self.path is None) == (self.make is None):
            raise ValueError("exactly one of `path` and `make` must be set; name a file or a function that writes one")
        return self


class RolloutsConfig(Config):
    """How responses are sampled for training."""

    engine: Literal["torch", "vllm"] = "torch"
    """Which engine generates. vllm needs the extra of that name, and its samples are not the same bits twice."""
    num_workers: int = Field(default=1, ge=1)
    """Inference replicas, each one process."""
    max_workers: int | None = Field(default=None, ge=1)
    """Start more replicas, up to so many, on nodes that join the cluster or that nobody uses; null = never."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs (on a CPU: processes) that share one replica, its weights cut into as many parts; with engine vllm."""
    prompts_per_step: int = Field(default=8, ge=1)
    """Prompts in each step of the loop."""
    samples_per_prompt: int = Field(default=4, ge=1)
    """Responses per prompt, the size of a group."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; learner and reference use the same."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest response, tokens."""
    stop: Strings = ()
    """Strings that end a response."""
    max_rows: int = Field(default=32, ge=4, multiple_of=4)
    """Samples decoded together by one engine."""

    @model_validator(mode="after")
    def _only_vllm_cuts_weights(self) -> "RolloutsConfig":
        if self.tensor_parallel > 1 and self.engine != "vllm":
            raise ValueError(
                f"tensor_parallel must be 1 with engine {self.engine}, got {self.tensor_parallel}: only vLLM cuts "
                "weights into parts; set engine vllm"
            )
        return self

    @model_validator(mode="after")
    def _grows_or_stays(self) -> "RolloutsConfig":
        if self.max_workers is not None and self.max_workers < self.num_workers:
            raise ValueError(
                f"max_workers must be at least num_workers = {self.num_workers}, got {self.max_workers}; raise it, or "
                "leave it out"
            )
        return self


class EvaluationConfig(Config):
    """Held-out prompts, always the same ones with the same random numbers, never trained on."""

    prompts: PromptsConfig | None = None
    """Held-out prompts; without them nothing is evaluated."""
    every: int = Field(default=10, ge=1)
    """Evaluate each so many steps; also before the first and after the last one."""
    num_prompts: int = Field(default=64, ge=1)
    """How many prompts, the first ones of the source."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses per prompt."""
    temperature: float = Field(default=1.0, ge=0)
    """0 = greedy. `eval_kl` is estimated on these samples, so it is only a KL at the training temperature."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k likeliest tokens, 0 = all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Keep the likeliest tokens of this total probability."""
    seed: int = 0
    """Of the evaluation's random numbers."""
