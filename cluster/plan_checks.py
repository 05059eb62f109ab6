"""What would keep a planned run from starting or from doing well, with the settings that change it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cluster.bundles import fit
from cluster.config import RunConfig
from cluster.memory_plan import DEFAULT_PROMPT_TOKENS, ProcessMemory, Sizes, object_store_bytes, vllm_rows
from cluster.object_store import is_url
from cluster.plan_layout import Layout, device_need, gigabytes
from cluster.plan_remedies import FULL_SHARE, remedy


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that keeps the run from starting (fail), or that its owner should know (warn)."""

    level: Literal["fail", "warn"]
    about: str
    """Role, or what else it is about."""
    message: str
    """What must be how, what it is, what to change."""


def problems(layout: Layout, sizes: Sizes | None) -> list[Problem]:
    """Return all problems, those that keep the run from starting first."""
    found = [*_places(layout), *_settings(layout.config, sizes), *_habits(layout)]
    if sizes is not None:
        found += [*_device_memory(layout, sizes), *_host_memory(layout, sizes)]
    return sorted(found, key=lambda problem: problem.level != "fail")


def _places(layout: Layout) -> Iterator[Problem]:
    for found in layout.fits:
        if found.shortage:
            yield Problem(level="fail", about=found.group.role, message=found.shortage)
    wanted = sum(found.group.count * found.group.gpus for found in layout.fits)
    total = layout.hardware.num_gpus
    if wanted > total:
        yield Problem(
            level="fail",
            about="cluster",
            message=f"GPUs of all processes must be at most the {total:g} there are, got {wanted:g} wanted; lower the "
            "number of workers or ranks, share GPUs (placement.reward_gpus=0.5), or add nodes",
        )
    elif wanted and wanted < total:
        yield Problem(
            level="warn", about="cluster", message=f"{total - wanted:g} of {total:g} GPUs are left without a process"
        )
    if layout.hardware.free is not None and not any(found.shortage for found in layout.fits):
        for found in fit([found.group for found in layout.fits], layout.hardware.free):
            if found.shortage:
                yield Problem(
                    level="warn",
                    about=found.group.role,
                    message=f"others use the cluster now, and the run would wait until they are done: {found.shortage}",
                )


def _settings(config: RunConfig, sizes: Sizes | None) -> Iterator[Problem]:
    """Yield what does not go together with the policy."""
    if sizes is None:
        return
    policy, rollouts = sizes.policy, config.rollouts
    if policy.positions is not None and rollouts.max_new_tokens >= policy.positions:
        yield Problem(
            level="fail",
            about="rollout",
            message=f"rollouts.max_new_tokens must be below the policy's {policy.positions} positions, got "
            f"{rollouts.max_new_tokens}: no prompt fits beside it; lower it",
        )
    if policy.heads % rollouts.tensor_parallel:
        yield Problem(
            level="fail",
            about="rollout",
            message=f"rollouts.tensor_parallel must divide the policy's {policy.heads} attention heads, got "
            f"{rollouts.tensor_parallel}; use {_largest_divisor(policy.heads, rollouts.tensor_parallel)}",
        )
    free = None if policy.positions is None else policy.positions - rollouts.max_new_tokens
    if config.prompts.max_prompt_tokens is None and (free is None or free > DEFAULT_PROMPT_TOKENS):
        yield Problem(
            level="warn",
            about="prompts",
            message=f"prompts.max_prompt_tokens is not set, and memory is planned for prompts of "
            f"{DEFAULT_PROMPT_TOKENS} tokens, while ones of {'any length' if free is None else free} would be taken; "
            "set it",
        )


def _habits(layout: Layout) -> Iterator[Problem]:
    """Yield what works, and not as its owner may think."""
    config = layout.config
    if config.rollouts.engine == "vllm":
        yield Problem(
            level="warn",
            about="rollout",
            message="bit-exact recovery is off: vLLM draws its own random numbers, so groups that are generated again "
            "after a failure have other samples; rollouts.engine=torch draws them as before",
        )
    per_update = config.rollouts.prompts_per_step // config.learner.num_minibatches
    if config.learner.num_ranks > per_update:
        yield Problem(
            level="warn",
            about="learner",
            message=f"an update has {per_update} groups for {config.learner.num_ranks} ranks, of which some have "
            "nothing to do: ranks get whole groups; raise rollouts.prompts_per_step, or lower learner.num_minibatches "
            "or learner.num_ranks",
        )
    if config.policy.dtype == "bfloat16" and not config.placement.learner_gpus:
        yield Problem(
            level="warn",
            about="learner",
            message="policy.dtype is bfloat16 on a CPU, whose products are many times slower than float32's where it "
            "has no AVX-512; set policy.dtype=float32",
        )
    if len(layout.hardware.nodes) > 1 and not (config.run.dir.startswith("/") or is_url(config.run.dir)):
        yield Problem(
            level="warn",
            about="run",
            message=f"run.dir must be a URL or a directory that all {len(layout.hardware.nodes)} nodes mount, got the "
            f"relative {config.run.dir!r}; set an absolute path (and CONCORD_CACHE)",
        )
    gang = layout.fits[0]
    num_nodes = len(set(gang.nodes))
    if num_nodes > 1 and not gang.shortage:
        yield Problem(
            level="warn",
            about="learner",
            message=f"no node holds all {gang.group.count} ranks, which are on {num_nodes} nodes: gradients go over "
            "the network",
        )


def _device_memory(layout: Layout, sizes: Sizes) -> Iterator[Problem]:
    for memory in layout.memory:
        if not memory.device:
            continue
        need, budget = device_need(layout, memory.role)
        if budget is None:
            yield Problem(
                level="warn",
                about=memory.role,
                message=f"needs {gigabytes(need)} of each GPU, whose memory is not known; describe it with --cluster",
            )
            continue
        if layout.config.rollouts.engine == "vllm" and memory.role == "rollout":
            yield from _vllm_memory(layout, sizes, memory, budget)
        elif need > budget:
            largest = sorted(memory.device, key=lambda part: part.num_bytes, reverse=True)[:3]
            held = ", ".join(f"{part.name} {gigabytes(part.num_bytes)}" for part in largest)
            yield Problem(
                level="fail",
                about=memory.role,
                message=f"memory of a GPU must hold a {memory.role} process's {gigabytes(need)}, got "
                f"{gigabytes(budget)} ({held}); {remedy(layout, sizes, memory.role)}",
            )
        elif need > FULL_SHARE * budget:
            yield Problem(
                level="warn",
                about=memory.role,
                message=f"{gigabytes(need)} of a GPU's {gigabytes(budget)} are planned for, and little is left for "
                f"fragmentation; {remedy(layout, sizes, memory.role)}",
            )


def _vllm_memory(layout: Layout, sizes: Sizes, memory: ProcessMemory, budget: int) -> Iterator[Problem]:
    rows, max_rows = vllm_rows(layout.config, memory, budget), layout.config.rollouts.max_rows
    if rows == 0:
        yield Problem(
            level="fail",
            about="rollout",
            message=f"memory of a GPU must hold {gigabytes(memory.part('weights'))} of the policy's weights and the "
            f"keys and values of a sample, got {gigabytes(budget)}; {remedy(layout, sizes, 'rollout')}",
        )
    elif rows < max_rows:
        yield Problem(
            level="warn",
            about="rollout",
            message=f"vLLM has room for {rows} samples of the greatest length at once, of rollouts.max_rows = "
            f"{max_rows}",
        )


def _host_memory(layout: Layout, sizes: Sizes) -> Iterator[Problem]:
    """Yield nodes whose main memory, or whose part of it for Ray's object store, is too small."""
    taken: dict[int, int] = {0: layout.memory_of("driver").host_bytes}
    for found in layout.fits:
        roles = [found.group.role] + (
            ["rollout"] if found.group.role == "learner" and layout.placement.shares_gpus else []
        )
        each = sum(layout.memory_of(role).host_bytes for role in roles)
        for index in found.nodes:
            taken[index] = taken.get(index, 0) + each
    store = object_store_bytes(layout.config, sizes)
    reported: set[tuple[int, int]] = set()
    for index, used in sorted(taken.items()):
        node = layout.hardware.nodes[index]
        if node.memory_bytes is None or (used, node.memory_bytes) in reported:
            continue
        reported.add((used, node.memory_bytes))
        if used + store > node.memory_bytes:
            yield Problem(
                level="fail",
                about="cluster",
                message=f"main memory of {node.name} must hold {gigabytes(used)} of processes and {gigabytes(store)} "
                f"in Ray's object store, got {gigabytes(node.memory_bytes)}; lower the workers or ranks on it, "
                "use a larger node, or lower pipeline.max_buffer_bytes",
            )
        elif node.object_store_bytes is not None and store > node.object_store_bytes:
            yield Problem(
                level="warn",
                about="cluster",
                message=f"Ray's object store on {node.name} should hold a version of the weights and the rollouts that "
                f"wait, {gigabytes(store)}, and has {gigabytes(node.object_store_bytes)}: it would use the disk; "
                f"start Ray with --object-store-memory={store}",
            )


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)
