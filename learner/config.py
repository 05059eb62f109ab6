"""Configuration of the learner's room: optimizer, ranks, supervised and reward-model training."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from actors.config import Config, FunctionConfig, PolicyConfig, Strings

_DecayRate = Annotated[float, Field(ge=0, lt=1)]


class LoraConfig(Config):
    """Low-rank adapters instead of full training (Hu et al. 2021)."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=32.0, gt=0)
    """Scale; the update is multiplied by alpha / rank."""
    target_modules: Strings = ("all-linear",)
    """Module names, or `all-linear`."""


class OptimizerConfig(Config):
    """AdamW and its learning-rate schedule."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or decaying to 0 at the end of the run."""
    warmup_steps: int = Field(default=0, ge=0)
    """Updates of linear warm-up; update k of w runs at (k+1)/w of the peak, so none has rate 0."""
    betas: tuple[_DecayRate, _DecayRate] = Field(default=(0.9, 0.95), strict=False)
    """Adam's decay rates, each in [0, 1)."""
    eps: float = Field(default=1e-8, gt=0)
    """Adam's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Clip the global gradient norm to this."""


OFFLOADING_STAGES = (1, 2)
"""ZeRO stages that DeepSpeed moves out of a GPU's way."""


class LearnerConfig(Config):
    """How the policy is trained on a batch."""

    backend: Literal["zero", "local"] = "zero"
    """zero: DeepSpeed; local: plain torch in one process."""
    num_ranks: int = Field(default=1, ge=1)
    """Learner processes."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What is sharded: 1 optimizer state, 2 + gradients, 3 + parameters."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""
    epochs: int = Field(default=1, ge=1)
    """Passes over each step's batch."""
    num_minibatches: int = Field(default=1, ge=1)
    """Optimizer updates per epoch."""
    microbatch_tokens: int = Field(default=1024, ge=1)
    """Trunk tokens in one forward-backward; a group above it is split by samples."""
    chunk_tokens: int = Field(default=512, ge=1)
    """Response tokens whose logits exist at one time."""
    softmax_bytes: int = Field(default=2**29, ge=0)
    """Softmax over the vocabulary that a rank keeps for the backward pass, bytes; what is above is computed twice."""
    first_epoch_bytes: int | None = Field(default=None, ge=0)
    """Activations of the first epoch that a rank keeps until the step's targets are known, so that values and old
    log-probs take no forward pass of their own; what is above is computed twice. 0 = none; null = half of the memory
    that is left at the first step on a CPU, one micro-batch's on a GPU. With one minibatch and ZeRO below 3."""
    critic: Literal["trunk", "separate"] = "trunk"
    """Value head on the policy's trunk, or a network of its own that starts as a copy of the policy."""
    lora: LoraConfig | None = None
    """Train low-rank adapters only."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    offload: Literal["none", "optimizer"] = "none"
    """optimizer: master weights and Adam's moments in main memory, updated there; with a GPU and ZeRO from stage 1."""

    @property
    def rests_in_main_memory(self) -> bool:
        """Whether weights and optimizer state leave a GPU while others have their turn on it.

        DeepSpeed moves those of stages 1 and 2 with any optimizer; stage 3 wants its own, stage 0 is not asked.
        """
        return self.backend == "local" or self.zero_stage in OFFLOADING_STAGES

    @model_validator(mode="after")
    def _local_is_one_process(self) -> "LearnerConfig":
        if self.backend == "local" and self.num_ranks != 1:
            raise ValueError(f"num_ranks must be 1 with backend local, got {self.num_ranks}; use backend zero")
        return self

    @model_validator(mode="after")
    def _graphs_can_be_kept(self) -> "LearnerConfig":
        has_sharded = self.backend == "zero" and self.zero_stage == 3
        if self.first_epoch_bytes and (self.num_minibatches > 1 or has_sharded):
            raise ValueError(
                f"first_epoch_bytes must be left out or 0, got {self.first_epoch_bytes} with num_minibatches "
                f"{self.num_minibatches}, backend {self.backend} and zero_stage {self.zero_stage}: graphs are kept "
                "with one minibatch, and with zero_stage 2 or less"
            )
        return self

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> "LearnerConfig":
        if self.offload != "none" and (self.backend == "local" or self.zero_stage == 0):
            raise ValueError(
                f"offload must be none with backend {self.backend} and zero_stage {self.zero_stage}, got "
                f"{self.offload}; use backend zero and zero_stage 1, 2 or 3"
            )
        return self


class EngineConfig(Config):
    """Which optimizer engine runs supervised or reward-model training, in one process."""

    backend: Literal["zero", "local"] = "local"
    """zero: DeepSpeed; local: plain torch."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """See LearnerConfig."""


class TrainingConfig(Config):
    """The supervised training loop's settings."""

    epochs: int = Field(default=1, ge=1)
    """Passes over the training data."""
    batch_size: int = Field(default=32, ge=1)
    """Examples per optimizer update."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, schedule="linear")
    """Optimizer and schedule."""
    max_tokens: int = Field(default=512, ge=8)
    """Longest example, tokens; longer ones are quarantined."""
    seed: int = 0
    """Of data order and new weights."""
    num_threads: int = Field(default=0, ge=0)
    """torch threads, 0 = all cores."""
    engine: EngineConfig = EngineConfig()
    """Optimizer engine."""


class DataConfig(Config):
    """A supervised data set: JSONL or Parquet."""

    path: str | None = None
    """File or directory; a path or an fsspec URL."""
    make: FunctionConfig | None = None
    """A function `f(directory, **arguments)` that writes such files; run once and cached by content."""
    strict: bool = False
    """Make a malformed row an error instead of quarantining it."""
    limit: int | None = Field(default=None, ge=1)
    """Use only so many training rows, drawn by seed."""

    @model_validator(mode="after")
    def _one_source(self) -> "DataConfig":
        if (self.path is None) == (self.make is None):
            raise ValueError("exactly one of `path` and `make` must be set; name a file or a function that writes one")
        return self


class SFTConfig(Config):
    """`concord sft`: next-token training on `prompt`/`completion` or `messages`, loss on completions."""

    output: str
    """Directory for the trained model, its metrics and its resolved configuration."""
    policy: PolicyConfig
    """The model to start from."""
    data: DataConfig
    """Rows with `prompt` and `completion`, or `messages`."""
    training: TrainingConfig = TrainingConfig()
    """The loop."""


class RewardModelConfig(Config):
    """`concord reward`: a scalar head on any encoder or decoder, trained on ratings or preference pairs."""

    output: str
    """Directory for the trained reward model, its metrics and its resolved configuration."""
    model: str
    """Path or hub name of a Hugging Face encoder or decoder."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model."""
    data: DataConfig
    """Rows with `text` and `rating` (regression); `prompt`, `chosen`, `rejected` (bradley_terry); or `prompt`, `safer`,
    `less_safe` and true or false in `safer_is_safe`, `less_safe_is_safe` (cost)."""
    objective: Literal["regression", "bradley_terry", "cost"]
    """regression: squared error on standardised ratings; bradley_terry: -log sigmoid(chosen - rejected); cost: a cost
    model (Safe-RLHF), higher for the less safe response, above 0 for an unsafe one, and not normalised."""
    held_out_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of distinct texts (or prompts) kept for the validation set, and as many again for the test set."""
    pair_margin: float = Field(default=1.0, ge=0)
    """Pairwise accuracy is measured on pairs whose ratings differ by more than this."""
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    """auto: mean for encoders, last token for decoders."""
    head_learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of the new head; the trunk uses training.optimizer."""
    freeze_embeddings: bool = True
    """Keep the word embeddings as they are."""
    training: TrainingConfig = TrainingConfig()
    """The loop."""
