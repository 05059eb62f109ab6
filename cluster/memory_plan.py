"""How much memory each process of a run takes at its fullest moment, by arithmetic.  Pure.

Of a learner rank, with P parameters of which T are trained, N ranks, b bytes an item (2 in bfloat16, 4 in float32):

    ZeRO stage   weights   gradients   optimizer (float32 masters and both moments)
    0            b P       b T         12 T, in float32 8 T (the weights are the masters)
    1            b P       4 T, in bfloat16 6 T (of both kinds)   12 T / N
    2            b P       4 T / N     12 T / N
    3            b P / N   4 T / N     12 T / N, and up to 10^9 gathered parameters

Beside these: what the graph of one micro-batch keeps for the backward pass, the buffer that gradients are reduced in,
and, where that is more, the flat copy of the gradients that an update makes when the graph is gone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from cluster.config import RunConfig
from cluster.model_shape import ModelShape

Role = Literal["driver", "rollout", "reward", "learner"]

_LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters
_BUCKET_ITEMS = 5 * 10**8  # DeepSpeed's reduce_bucket_size
_ALONE_BUCKET_ITEMS = 2 * 10**7  # of learner/zero.py, for one rank
_CONTEXT_BYTES = 10**9  # CUDA's context, its libraries' workspaces, NCCL's buffers: a round figure
_HOST_BYTES = {"cpu": 7 * 10**8, "gpu": 25 * 10**8}  # Python, torch, ray and Numba in a process: round figures
_PACKING_BYTES = 2 * 2**27  # of actors/packed_linear.py: siblings laid together, and a piece in its new order
_VLLM_SHARE = 0.92  # of a GPU's memory, vLLM's default
_WINDOW = 16  # key-value windows of the torch engine grow by so many tokens

DEFAULT_PROMPT_TOKENS = 1024
"""What prompts are counted with where prompts.max_prompt_tokens is not set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the models of a run are; None is what is not known."""

    policy: ModelShape
    policy_parameters: int
    """As stored, or as the shape says."""
    judges: tuple[tuple[str, int], ...] = ()
    """(component, parameters) of each reward model whose size is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a process holds of one kind."""

    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """One process of a role."""

    role: Role
    count: int
    device: tuple[Part, ...] = field(default=())
    """On each of its GPUs; empty on a CPU."""
    host: tuple[Part, ...] = field(default=())

    @property
    def device_bytes(self) -> int:
        """Return the sum of the parts on a GPU."""
        return sum(part.num_bytes for part in self.device)

    @property
    def host_bytes(self) -> int:
        """Return the sum of the parts in main memory."""
        return sum(part.num_bytes for part in self.host)

    def on_device(self, *names: str) -> int:
        """Return the bytes of some kinds on a GPU."""
        return sum(part.num_bytes for part in self.device if part.name in names)

    def part(self, name: str) -> int:
        """Return the bytes of a kind, on the GPU or in main memory; 0 where there is none."""
        return sum(part.num_bytes for part in (*self.device, *self.host) if part.name == name)


def plan_memory(config: RunConfig, sizes: Sizes) -> tuple[ProcessMemory, ...]:
    """Return what each role's processes take, the driver's too."""
    driver = ProcessMemory(role="driver", count=1, host=(Part(name="process", num_bytes=_HOST_BYTES["cpu"]),))
    return driver, rollout_memory(config, sizes), reward_memory(config, sizes), learner_memory(config, sizes)


def prompt_tokens(config: RunConfig, policy: ModelShape) -> int:
    """Return the longest prompt that memory is planned for."""
    given = config.prompts.max_prompt_tokens
    left = None if policy.positions is None else max(1, policy.positions - config.rollouts.max_new_tokens)
    return min(given or DEFAULT_PROMPT_TOKENS, left or given or DEFAULT_PROMPT_TOKENS)


def object_store_bytes(config: RunConfig, sizes: Sizes) -> int:
    """Return what a node's object store holds: one version of the weights, and rollouts that wait for the learner."""
    weights = 0 if config.pipeline.weights.is_shared else _published_bytes(config, sizes)
    return weights + config.pipeline.max_buffer_bytes


def _published_bytes(config: RunConfig, sizes: Sizes) -> int:
    return item_bytes(config, has_gpu=bool(config.placement.learner_gpus)) * sizes.policy_parameters


def checkpoint_bytes(config: RunConfig, sizes: Sizes) -> int:
    """Return what a checkpoint takes on the disk: float32 parameters and both moments of what is trained."""
    return 12 * sum(network.trained for network in _networks(config, sizes))


def item_bytes(config: RunConfig, *, has_gpu: bool) -> int:
    """Return the bytes of a number in the policy's dtype."""
    dtype = config.policy.dtype
    return 2 if dtype == "bfloat16" or (dtype == "auto" and has_gpu) else 4


def learner_memory(config: RunConfig, sizes: Sizes) -> ProcessMemory:
    """Return one rank's memory."""
    learner, has_gpu = config.learner, bool(config.placement.learner_gpus)
    item = item_bytes(config, has_gpu=has_gpu)
    networks = list(_networks(config, sizes))
    states = [_states(config, network, item) for network in networks]
    graph = [*_graph(config, sizes, item, num_networks=len(networks))]
    working = sum(part.num_bytes for part in graph)
    bucket = sum(_bucket(config, network, item) for network in networks)
    update = sum(state.update for state in states)
    optimizer = Part(name="optimizer", num_bytes=sum(state.optimizer for state in states))
    gradients = Part(name="gradients", num_bytes=sum(state.gradients for state in states))
    offloaded = [optimizer, gradients] if learner.offload == "optimizer" else []
    parts = [
        Part(name="weights", num_bytes=sum(state.weights for state in states)),
        Part(name="gathered", num_bytes=max(state.gathered for state in states)),
        *([] if offloaded else [gradients, optimizer]),
        *_reference_of_learner(config, sizes, item),
        *graph,
        Part(name="buffers", num_bytes=bucket),
        Part(name="update", num_bytes=max(0, update - working - bucket)),
        Part(name="published", num_bytes=_published_bytes(config, sizes) if config.pipeline.weights.is_shared else 0),
    ]
    # While a checkpoint is written each rank has its share of it in main memory; a model is loaded there first.
    share = checkpoint_bytes(config, sizes) // learner.num_ranks
    loading = item * sizes.policy_parameters if has_gpu else 0
    host = [
        *offloaded,
        Part(name="checkpoint or loading", num_bytes=max(share, loading * len(networks))),
        Part(
            name="sending",
            num_bytes=0 if config.pipeline.weights.is_shared else 2 * config.pipeline.weights.bucket_bytes,
        ),
    ]
    return _process("learner", learner.num_ranks, parts, host, has_gpu=has_gpu)


def rollout_memory(config: RunConfig, sizes: Sizes) -> ProcessMemory:
    """Return one rollout worker's memory, with tensor parallelism that of each of its GPUs."""
    rollouts, policy = config.rollouts, sizes.policy
    has_gpu = bool(config.placement.rollout_gpus)
    item, parts_of_replica = item_bytes(config, has_gpu=has_gpu), rollouts.tensor_parallel
    weights = item * sizes.policy_parameters
    prompt = prompt_tokens(config, policy)
    length = -(-(prompt + rollouts.max_new_tokens) // _WINDOW) * _WINDOW
    parts = [
        Part(name="weights", num_bytes=weights // parts_of_replica),
        Part(
            name="kv cache",
            num_bytes=policy.kv_bytes(rows=rollouts.max_rows, tokens=length, item_bytes=item) // parts_of_replica,
        ),
        Part(name="activations", num_bytes=_forward_bytes(policy, prompt, item)),
        Part(name="logits", num_bytes=3 * 4 * rollouts.max_rows * policy.vocab),
    ]
    if rollouts.engine == "torch" and not has_gpu and item == 4 and config.policy.pack_weights:
        packed = item * _packed_parameters(policy)
        parts.append(Part(name="packed weights", num_bytes=packed + min(packed, _PACKING_BYTES)))
    # vLLM takes a version on in main memory, and hands it to processes of its own through shared memory.
    copies = (1 if parts_of_replica == 1 else 2) if rollouts.engine == "vllm" else int(has_gpu)
    host = [Part(name="loading", num_bytes=copies * weights)]
    if not has_gpu and parts_of_replica > 1:  # all of its processes are in the same main memory
        parts = [Part(name=part.name, num_bytes=parts_of_replica * part.num_bytes) for part in parts]
    return _process("rollout", rollouts.num_workers, parts, host, has_gpu=has_gpu)


def reward_memory(config: RunConfig, sizes: Sizes) -> ProcessMemory:
    """Return one reward worker's memory."""
    has_gpu, policy = bool(config.placement.reward_gpus), sizes.policy
    item = item_bytes(config, has_gpu=has_gpu)
    judge_item = 2 if has_gpu else 4
    parts = [Part(name=f"reward model {name}", num_bytes=judge_item * parameters) for name, parameters in sizes.judges]
    loading = max((part.num_bytes for part in parts), default=0)
    if config.algorithm.reference.mode != "base":
        group = min(config.rollouts.samples_per_prompt * config.rollouts.max_new_tokens, 8192)
        tokens = prompt_tokens(config, policy) + max(group, config.rollouts.max_new_tokens)
        reference = item * sizes.policy_parameters
        parts += [
            Part(name="reference", num_bytes=reference),
            Part(name="activations", num_bytes=_forward_bytes(policy, tokens, item)),
        ]
        loading = max(loading, reference)
    host = [Part(name="loading", num_bytes=loading if has_gpu else 0)]
    return _process("reward", config.reward.num_workers, parts, host, has_gpu=has_gpu)


def vllm_rows(config: RunConfig, memory: ProcessMemory, gpu_bytes: int) -> int:
    """Return how many samples of the greatest length vLLM has room for at once; 0 where not even one fits."""
    fixed = memory.device_bytes - memory.part("kv cache")
    row = memory.part("kv cache") // config.rollouts.max_rows
    return max(0, int(_VLLM_SHARE * gpu_bytes - fixed) // max(1, row))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Network:
    """A network with an optimizer engine of its own."""

    parameters: int
    trained: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _States:
    """What an engine holds, bytes."""

    weights: int
    gathered: int
    gradients: int
    optimizer: int
    update: int


def _networks(config: RunConfig, sizes: Sizes) -> Iterator[_Network]:
    lora, policy = config.learner.lora, sizes.policy
    has_values = config.algorithm.needs_values
    is_separate = has_values and config.learner.critic == "separate"
    head = policy.hidden + 1 if has_values else 0
    adapters = policy.lora_parameters(lora.rank) if lora else 0
    bodies = [(sizes.policy_parameters, 0 if is_separate else head)]
    if is_separate:
        bodies.append((sizes.policy_parameters - (policy.num_parameters - policy.trunk_parameters), head))
    for body, own_head in bodies:
        trained = (adapters if lora else body) + own_head
        yield _Network(parameters=body + own_head + adapters, trained=trained)


def _states(config: RunConfig, network: _Network, item: int) -> _States:
    """Return what an engine holds; see the module."""
    learner, trained = config.learner, network.trained
    ranks, is_wide = learner.num_ranks, item == 4
    stage = learner.zero_stage if learner.backend == "zero" else 0
    weights, gathered = item * network.parameters, 0
    if stage == 3:
        weights //= ranks
        gathered = item * min(network.parameters, _LIVE_PARAMETERS)
    if stage == 0:
        gradients = 4 * trained if learner.backend == "local" else item * trained
        update = 0 if is_wide or learner.backend == "local" else 4 * trained
        optimizer = 8 * trained if is_wide else 12 * trained
    else:
        gradients = 4 * trained // ranks
        if stage == 1:  # whole; in half precision DeepSpeed keeps them in float32 beside those of the backward pass
            gradients = (4 if is_wide else 6) * trained
        has_copy = stage == 2 or (stage == 1 and is_wide)
        update = 4 * trained // ranks if has_copy and learner.offload == "none" else 0
        optimizer = 12 * trained // ranks
    return _States(weights=weights, gathered=gathered, gradients=gradients, optimizer=optimizer, update=update)


def _bucket(config: RunConfig, network: _Network, item: int) -> int:
    """Return the buffer that DeepSpeed reduces gradients in; on a CPU memory that is not written to takes no room."""
    learner = config.learner
    if learner.backend == "local":
        return item * network.trained if item == 2 else 0  # gradients before they are added to the masters'
    if learner.zero_stage == 0:
        return 0
    is_alone = learner.num_ranks == 1 and learner.zero_stage < 3
    bucket = _ALONE_BUCKET_ITEMS if is_alone else _BUCKET_ITEMS
    return item * (bucket if config.placement.learner_gpus else min(bucket, network.trained))


def _graph(config: RunConfig, sizes: Sizes, item: int, *, num_networks: int) -> Iterator[Part]:
    """Yield what a micro-batch's forward pass leaves for the backward pass, and what that takes at one time."""
    learner, policy = config.learner, sizes.policy
    tokens = max(learner.microbatch_tokens, prompt_tokens(config, policy) + config.rollouts.max_new_tokens)
    graph = policy.activation_bytes(tokens=tokens, item_bytes=item, has_checkpoints=learner.gradient_checkpointing)
    graph = max(graph * num_networks, learner.first_epoch_bytes or 0)
    mask = tokens * tokens * (1 + item)  # the row's boolean mask, and as numbers that are added to scores
    yield Part(name="activations", num_bytes=graph + mask)
    softmax = min(learner.softmax_bytes, 4 * tokens * policy.vocab)
    chunk = min(learner.chunk_tokens, tokens) * policy.vocab * (4 + 2 * item)
    head = 0 if learner.lora else policy.vocab * policy.hidden * (4 + item)
    yield Part(name="logits", num_bytes=softmax + chunk + head)


def _reference_of_learner(config: RunConfig, sizes: Sizes, item: int) -> Iterator[Part]:
    mode = config.algorithm.reference.mode
    if mode in ("swap", "ema"):
        yield Part(name="reference", num_bytes=(4 if mode == "ema" else item) * sizes.policy_parameters)


def _forward_bytes(policy: ModelShape, tokens: int, item: int) -> int:
    """Return what a forward pass without gradients holds at one time: a layer's tensors."""
    return tokens * item * (4 * policy.hidden + 3 * policy.intermediate)


def _packed_parameters(policy: ModelShape) -> int:
    """Return the parameters of plain linear layers, the head among them; GPT-2 stores its layers in another way."""
    layers = 0 if policy.model_type == "gpt2" else sum(linear.num_parameters for linear in policy.linears)
    return policy.layers * layers + policy.vocab * policy.hidden


def _process(role: Role, count: int, parts: list[Part], host: list[Part], *, has_gpu: bool) -> ProcessMemory:
    """Return a process; on a CPU everything is in main memory."""
    runtime = Part(name="process", num_bytes=_HOST_BYTES["gpu" if has_gpu else "cpu"])
    parts, host = ([part for part in some if part.num_bytes] for some in (parts, host))
    if not has_gpu:
        return ProcessMemory(role=role, count=count, host=(*parts, *host, runtime))
    context = Part(name="process", num_bytes=_CONTEXT_BYTES)
    return ProcessMemory(role=role, count=count, device=(*parts, context), host=(*host, runtime))
