"""The whole run's configuration: every room's section, the checks that span rooms, and loading from YAML.

Nothing here imports torch, ray, deepspeed or transformers: a wrong setting is reported in well under two seconds.
"""

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from actors.config import Config, EvaluationConfig, PolicyConfig, PromptsConfig, RolloutsConfig
from cluster.placement_config import PlacementConfig, placement_problems
from learner.algorithm_config import AlgorithmConfig
from learner.config import LearnerConfig
from reward.config import RewardConfig


class ConfigError(ValueError):
    """A configuration that cannot run; the message names every place, value, rule and remedy."""


class RunSection(Config):
    """Identity and length of the run."""

    dir: str = Field(min_length=1)
    """Run directory; absolute inside a Ray job, whose working directory is temporary."""
    seed: int = 0
    """Every random number of the run follows from it."""
    num_steps: int = Field(ge=1)
    """Steps of the loop."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Save resumable state each so many steps; also after the last one."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints kept; older ones are deleted."""
    trackers: Annotated[tuple[Literal["wandb", "mlflow"], ...], Field(strict=False)] = ()
    """Where metrics are shown beside TensorBoard and Ray: wandb, mlflow; each needs its package, whose own
    environment variables say where it sends to."""


class WeightsConfig(Config):
    """How new weights get from the learner to the rollout workers."""

    transport: Literal["object_store", "process_group", "shared_memory"] = "object_store"
    """object_store: each worker takes them from Ray's store, a whole copy on each node, while it generates on;
    process_group: one broadcast to all workers, bucket by bucket, which stop generating meanwhile; shared_memory: they
    are read where the learner writes them, on the GPU that both share (CUDA IPC) or in main memory; takes
    placement.colocated and one rank."""
    wire: Literal["auto", "gloo", "nccl"] = "auto"
    """Of a process group's broadcast; auto = nccl where learner and rollout workers have whole GPUs, else gloo."""
    bucket_bytes: int = Field(default=32 * 2**20, ge=2**10)
    """Tensors are gathered and sent in runs of about this size; one larger tensor is a bucket of its own."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Longest time that one bucket's broadcast may hold the learner, seconds; workers that are later take the weights
    from the object store."""
    delta: bool = False
    """Send the elements that changed only, exact to the bit: for half precision over slow links."""

    @property
    def is_shared(self) -> bool:
        """Whether a version is read where the learner writes it."""
        return self.transport == "shared_memory"


class PipelineConfig(Config):
    """How stages overlap."""

    max_staleness: int = Field(default=0, ge=0)
    """Policy versions between sampling and learning, of a sample's oldest token; 0 = exactly on-policy, and generation
    and learning take turns; from 1 on they run at the same time."""
    in_flight_updates: Literal["keep", "reprefill", "drain"] | None = None
    """What becomes of unfinished samples when new weights arrive: they go on with the keys and values they have, with
    new ones, or finish with the old weights first; null = keep. With max_staleness 0 there are none."""
    max_buffer_bytes: int = Field(default=2**30, ge=2**10)
    """Rollouts that are generated and not yet learnt from, bytes: above it only the next step's groups are started."""
    weights: WeightsConfig = WeightsConfig()
    """Sending weights."""
    timeout_s: float = Field(default=1800.0, gt=0)
    """Longest wait for any one remote call, seconds; a process that is later is ended and replaced."""
    heartbeat_s: float = Field(default=60.0, gt=0)
    """A rollout worker that generates is asked after half of this time and must answer within it, seconds; one decoding
    step, and taking on new weights, must not take longer."""
    max_restarts: int = Field(default=3, ge=0)
    """Times that one worker, or the learner, is started again without a success in between."""
    max_retries: int = Field(default=5, ge=0)
    """Failures of the machinery that one group may meet before the run ends."""
    max_quarantined: int = Field(default=100, ge=0)
    """Groups that may fail through their own fault, in the whole run, before it ends."""

    @model_validator(mode="after")
    def _weights_can_change(self) -> "PipelineConfig":
        if self.max_staleness == 0 and self.in_flight_updates is not None:
            raise ValueError(
                f"in_flight_updates must be left out with max_staleness 0, got {self.in_flight_updates}: no sample is "
                "in flight when weights change; raise max_staleness"
            )
        if self.weights.transport == "process_group" and self.in_flight_updates == "drain":
            raise ValueError(
                "in_flight_updates must be keep or reprefill with weights.transport process_group, got drain: the "
                "broadcast would wait for the longest sample; change one of them"
            )
        if self.weights.transport == "process_group" and self.weights.timeout_s >= self.heartbeat_s:
            raise ValueError(
                f"weights.timeout_s must be below heartbeat_s = {self.heartbeat_s:g} with weights.transport "
                f"process_group, got {self.weights.timeout_s:g}: a worker that waits for a bucket would seem hung"
            )
        return self

    @property
    def update_mode(self) -> Literal["keep", "reprefill", "drain"]:
        """What becomes of unfinished samples when new weights arrive."""
        if self.max_staleness == 0:
            return "drain"  # what is in flight after a failure ends with the weights it began with, to the last bit
        return self.in_flight_updates or "keep"


class RunConfig(Config):
    """A training run: `concord train`."""

    run: RunSection
    policy: PolicyConfig
    prompts: PromptsConfig
    rollouts: RolloutsConfig = RolloutsConfig()
    reward: RewardConfig
    learner: LearnerConfig = LearnerConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    pipeline: PipelineConfig = PipelineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    placement: PlacementConfig = PlacementConfig()

    @model_validator(mode="after")
    def _spans_rooms(self) -> "RunConfig":
        minibatches, prompts = self.learner.num_minibatches, self.rollouts.prompts_per_step
        if minibatches > prompts:
            raise ValueError(
                f"learner.num_minibatches must be at most rollouts.prompts_per_step, got {minibatches} > {prompts}; "
                "a minibatch holds whole groups"
            )
        sequences, horizon = prompts * self.rollouts.samples_per_prompt, self.algorithm.kl.horizon
        if horizon is not None and 0.2 * sequences >= horizon:
            raise ValueError(
                f"algorithm.kl.horizon must be above a fifth of the {sequences} sequences per step, got {horizon}; "
                "the coefficient could become negative in one step"
            )
        for problem in _algorithm_problems(self):
            raise ValueError(problem)
        for problem in placement_problems(self.placement, self.rollouts, self.learner):
            raise ValueError(problem)
        placement = self.placement
        weights = self.pipeline.weights
        if weights.is_shared and not (placement.colocated and self.learner.num_ranks == 1):
            raise ValueError(
                "pipeline.weights.transport must be object_store or process_group, got shared_memory, with "
                f"placement.colocated {placement.colocated} and learner.num_ranks {self.learner.num_ranks}: memory is "
                "shared where a rollout worker and the only rank take turns; set placement.colocated true and one rank"
            )
        is_apart = self.pipeline.max_staleness or weights.transport == "process_group" or weights.delta
        if placement.colocated and is_apart:
            raise ValueError(
                f"placement.colocated must be false with pipeline.max_staleness {self.pipeline.max_staleness}, "
                f"pipeline.weights.transport {weights.transport} and delta {weights.delta}: who gives memory back is "
                "not there for a broadcast or for changes; set max_staleness 0, transport object_store or "
                "shared_memory, delta false"
            )
        if self.rollouts.engine == "vllm" and weights.delta:
            raise ValueError(
                "pipeline.weights.delta must be false with rollouts.engine vllm, which takes whole versions"
            )
        if self.policy.dtype == "auto" and bool(placement.rollout_gpus) != bool(placement.learner_gpus):
            raise ValueError(
                "policy.dtype must be named when only one of placement.rollout_gpus and placement.learner_gpus is set: "
                "auto would be bfloat16 on one side and float32 on the other"
            )
        return self


def _algorithm_problems(config: RunConfig) -> Iterator[str]:
    """Yield what the algorithm asks of other sections and does not get."""
    algorithm, samples = config.algorithm, config.rollouts.samples_per_prompt
    compares = algorithm.compares_group or algorithm.baseline == "group_mean"
    if samples < 2 and (compares or algorithm.dynamic_sampling is not None):
        yield (
            f"rollouts.samples_per_prompt must be at least 2 with algorithm {algorithm.name}, which compares the "
            f"answers to a prompt, got {samples}; raise it"
        )
    if config.learner.critic == "separate" and not algorithm.needs_values:
        yield (
            f"learner.critic must be left out with algorithm {algorithm.name}, which has no value function, got "
            "separate"
        )
    if algorithm.policy_loss == "policy_gradient" and config.learner.epochs > 1:
        yield (
            "learner.epochs must be 1 with algorithm.policy_loss policy_gradient, which may use a sample once, got "
            f"{config.learner.epochs}; set policy_loss ppo_clip to use it again"
        )
    if config.reward.credit is not None and algorithm.compares_group:
        yield (
            f"reward.credit must be left out with algorithm {algorithm.name}, whose advantage is the same for all "
            "tokens of a response; use an advantage per token (gae, n_step, vtrace, returns)"
        )
    if algorithm.target_kl is not None and config.learner.epochs * config.learner.num_minibatches == 1:
        yield (
            f"algorithm.target_kl must be left out with one update a step, got {algorithm.target_kl}: it leaves out "
            "later ones; raise learner.epochs or learner.num_minibatches"
        )
    is_exact = config.policy.dtype == "float32" or (config.policy.dtype == "auto" and not config.placement.learner_gpus)
    is_on_policy = config.pipeline.max_staleness == 0
    if algorithm.corrections and is_exact and is_on_policy and algorithm.off_policy.old_logprobs == "auto":
        yield (
            f"algorithm.off_policy.old_logprobs must be recomputed with {algorithm.corrections}: in float32 and "
            "on-policy auto takes the recorded ones, and every ratio old / recorded is 1"
        )
    if config.learner.offload != "none" and not config.placement.learner_gpus:
        yield (
            f"learner.offload must be none without a GPU for the learner, got {config.learner.offload}: its state is "
            "in main memory already; set placement.learner_gpus or leave it out"
        )
    if algorithm.reference.mode == "base" and config.learner.lora is None:
        yield (
            "learner.lora must be set with algorithm.reference.mode base, which is the policy without its adapters; "
            "set it, or mode fixed"
        )
    component = algorithm.dynamic_sampling and algorithm.dynamic_sampling.component
    if component and component not in config.reward.components:
        yield (
            "algorithm.dynamic_sampling.component must be one of reward.components "
            f"{', '.join(config.reward.components)}, got {component!r}"
        )


ConfigType = TypeVar("ConfigType", bound=Config)


def load(config_type: type[ConfigType], path: str, overrides: Sequence[str] = ()) -> ConfigType:
    """Read a YAML file, apply `section.field=value` overrides and `${section.field}` references, validate.

    Raises:
        ConfigError: naming each wrong key or value by full path, with the rule and the nearest right key.
    """
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"an override must look like section.field=value, got {override!r}")
    return validate(config_type, read_yaml(path, list(overrides)), where=path)


def read_yaml(path: str, changes: list[str] | dict[str, Any]) -> dict[str, Any]:
    """Return a YAML file's sections with changes (dotted, or nested like it) merged in and references resolved.

    Raises:
        ConfigError: when it is no such file.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not os.path.isfile(path):
        raise ConfigError(f"{path} must be a YAML file, and there is none; name an existing configuration")
    try:
        loaded = OmegaConf.load(path)
        if not OmegaConf.is_dict(loaded):
            raise ConfigError(f"{path} must hold sections (key: value), got {type(loaded).__name__}")
        merged: Any = loaded
        for change in [OmegaConf.from_dotlist([text]) for text in changes] if isinstance(changes, list) else [changes]:
            _open_named_section(merged, change)
            merged = OmegaConf.merge(merged, change)
        raw: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} must be YAML: {error}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error
    except TypeError as error:
        raise ConfigError(f"{path}: a section must stay a section, and a change puts a list or value there") from error
    sections: dict[str, Any] = raw
    return sections


def _open_named_section(sections: Any, change: Any) -> None:
    """Write `algorithm: NAME` as a section where a change sets one of its fields, which else would replace the name."""
    name = sections.get("algorithm")
    if isinstance(name, str) and isinstance(change.get("algorithm"), Mapping):
        sections["algorithm"] = {"name": name}


def validate(config_type: type[ConfigType], raw: Any, where: str) -> ConfigType:
    """Build the config from plain data.

    Raises:
        ConfigError: see `load`.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} must hold sections (key: value), got {type(raw).__name__}")
    try:
        return config_type.model_validate(raw)
    except ValidationError as error:
        details = error.errors()
        # Of a setting that is a name or a section, only the part that was meant is explained.
        meant = [d for d in details if not (d["loc"][-1:] == ("str",) and isinstance(d["input"], dict))]
        lines = [_explain(config_type, d) for d in meant or details]
        raise ConfigError(f"{where}: " + "\n".join(lines)) from error


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML that `load` reads back to an equal object."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def _explain(config_type: type[Config], details: Any) -> str:
    location = [part for part in details["loc"] if not _is_union_branch(part)]
    path = ".".join(str(part) for part in location)
    if details["type"] == "extra_forbidden":
        names = _keys_at(config_type, details["loc"][:-1])
        near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(names))}"
        return f"{path} is not a setting; {hint}"
    if details["type"] == "missing":
        return f"{path} must be set; it has no default"
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if details["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path} must be {message}, got {details['input']!r}"


def _is_union_branch(part: Any) -> bool:
    return isinstance(part, str) and (part == "str" or part.endswith("Config"))


def _keys_at(config_type: type[BaseModel], location: Sequence[Any]) -> list[str]:
    current: type[BaseModel] = config_type
    annotation: Any = config_type
    for part in location:
        if part in current.model_fields:
            annotation = current.model_fields[part].annotation
        current = _model_in(annotation, str(part) if _is_union_branch(part) else None) or current
    return list(current.model_fields)


def _model_in(annotation: Any, name: str | None) -> type[BaseModel] | None:
    """Return the first section in an annotation, or the one whose class has a name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation if name in (None, annotation.__name__) else None
    return next((found for part in get_args(annotation) if (found := _model_in(part, name))), None)
