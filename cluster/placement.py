"""Which processes a run has, what each may use, and a Ray cluster to hold them.

Rollout and reward workers are busy at the same time and share the cores.  On-policy the learner works while they wait,
so it may use all of them; with `pipeline.max_staleness` it works beside them and has a share of its own.  Busy torch
threads never exceed cores, but for one thread each where there are more processes: oversubscribed OpenMP barriers cost
4-25x.
"""

import glob
import logging
import math
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from actors import faults
from cluster.bundles import BundleGroup, Node, gang_strategy
from cluster.config import RunConfig

ENVIRONMENT = {
    "MKL_CBWR": "AVX2,STRICT",  # one row has the same bits in every batch and for every thread count
    "OMP_WAIT_POLICY": "PASSIVE",  # idle threads sleep, so stages that alternate can each use all cores
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # weights are fetched on a thread of their own
    "RAY_max_direct_call_object_size": "8192",  # rows stay on their node; larger answers would go to the driver whole
}
"""Of every worker process; must be set before torch is loaded."""

CPU_ENVIRONMENT = ENVIRONMENT | {"DS_ACCELERATOR": "cpu"}
"""Of processes without a GPU: DeepSpeed need not look for one."""

LEARNER_ENVIRONMENT = CPU_ENVIRONMENT | {
    # glibc: a large tensor gets memory that another one has given back, instead of new pages that the kernel fills with
    # zeros first, which takes a sixth of a step.
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
}
"""Of learners without a GPU; they hold on to the most memory that a step took."""


def local_environment() -> dict[str, str]:
    """Return the environment variables for training in this very process, before torch is loaded."""
    return ENVIRONMENT if glob.glob("/dev/nvidia[0-9]*") else CPU_ENVIRONMENT


VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is in the worker's own process, where weights reach it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # threads are the planner's business
    "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),  # GiB
    "VLLM_NO_USAGE_STATS": "1",
}
"""Of rollout workers whose engine is vLLM."""


class PlacementError(RuntimeError):
    """The cluster cannot hold the run's processes; the message names what is wanted and what there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Processes:
    """Processes of one role; `cpus` is Ray's logical share, `threads` the torch threads."""

    role: str
    count: int
    cpus: float
    gpus: float
    threads: int
    engine: str = ""
    """What rollout workers generate with."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Selectors of the nodes that they may be on."""

    @property
    def device(self) -> str:
        """Return torch's device name for these processes."""
        return "cuda" if self.gpus else "cpu"

    @property
    def busy_cpus(self) -> float:
        """Return the cores that one keeps busy: what it is to have on a node that it need not share with others."""
        return self.cpus if self.gpus else max(self.cpus, float(self.threads))

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment variables of these processes; the driver's planned faults are theirs too."""
        planned = {name: os.environ[name] for name in faults.VARIABLES if name in os.environ}
        on_cpu = LEARNER_ENVIRONMENT if self.role == "learner" else CPU_ENVIRONMENT
        of_engine = VLLM_ENVIRONMENT if self.engine == "vllm" else {}
        return (ENVIRONMENT if self.gpus else on_cpu) | of_engine | planned

    def options(self) -> dict[str, Any]:
        """Return Ray actor options."""
        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "runtime_env": {"env_vars": self.environment},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """All processes of a run beside the driver."""

    cores: int
    rollout: Processes
    reward: Processes
    learner: Processes
    shares_gpus: bool = False
    """Whether a rollout worker and a learner rank are on one GPU, each with half of it in Ray's books."""

    @property
    def all(self) -> tuple[Processes, ...]:
        """Return the three roles."""
        return (self.rollout, self.reward, self.learner)

    @property
    def pools(self) -> tuple[Processes, ...]:
        """Return the roles that need places of their own beside the learner's ranks."""
        return (self.reward,) if self.shares_gpus else (self.rollout, self.reward)

    def groups(self, nodes: Sequence[Node]) -> tuple[BundleGroup, ...]:
        """Return the bundles to ask for, the learner's first; which strategy it has hangs on the nodes."""
        gang = gang_group(self.learner, guests=self.rollout if self.shares_gpus else None, nodes=nodes)
        return (gang, *map(_pool_group, self.pools))

    def trial_bundles(self) -> list[tuple[BundleGroup, int]]:
        """Return the bundles of a Tune trial in their order, as (group, slot in it): the ranks' come first."""
        return [(group, slot) for group in self.groups(()) for slot in range(group.count)]


def gang_group(learner: Processes, *, guests: Processes | None, nodes: Sequence[Node]) -> BundleGroup:
    """Return the bundles of the learner's ranks, each with room for a guest where there are some."""
    members = [learner] if guests is None else [learner, guests]
    cpus = sum(processes.cpus for processes in members)
    gpus = sum(processes.gpus for processes in members)
    return BundleGroup(
        role="learner",
        count=learner.count,
        cpus=cpus,
        gpus=gpus,
        strategy=gang_strategy(learner.count, cpus=cpus, gpus=gpus, labels=learner.labels, nodes=nodes),
        labels=learner.labels,
    )


def _pool_group(processes: Processes) -> BundleGroup:
    """Return the bundles of workers that know nothing of each other."""
    return BundleGroup(
        role=processes.role,
        count=processes.count,
        cpus=processes.cpus,
        gpus=processes.gpus,
        strategy="SPREAD" if processes.role == "rollout" and processes.gpus <= 1 else "PACK",
        labels=processes.labels,
    )


def plan_placement(config: RunConfig, *, cores: int | None = None, node_cores: int | None = None) -> Placement:
    """Share the cores among the run's processes.

    Args:
        config: the run, whose `placement.cores` goes before `cores`.
        cores: that the run may use; this machine's by default.
        node_cores: of the smallest node, more threads than which no process has; all cores by default.
    """
    placement, learner_count = config.placement, config.learner.num_ranks
    cores = placement.cores or cores or os.cpu_count() or 1
    node_cores = node_cores or cores
    rollout_count, reward_count = config.rollouts.num_workers, config.reward.num_workers
    # One logical CPU each where there are enough; otherwise the stages, which take turns, share what there is.  Cores
    # that a run has been given are all in Ray's books, so that nobody else takes them.
    share = cores * 100 // (rollout_count + reward_count + learner_count) / 100
    cpus = share if placement.cores else min(1.0, share)
    reward_threads = placement.reward_threads or min(node_cores, max(1, cores // 4 // reward_count))
    rest = cores - reward_threads * reward_count
    if config.pipeline.max_staleness == 0:
        for_rollouts, for_learner = rest, cores
    else:
        for_rollouts = for_learner = max(rest, 2) // 2
    rollout_threads = placement.rollout_threads or min(node_cores, max(1, for_rollouts // rollout_count))
    learner_threads = placement.learner_threads or min(node_cores, max(1, for_learner // learner_count))
    shares_gpus = placement.shares_gpus
    half = 2 if shares_gpus else 1
    return Placement(
        cores=cores,
        shares_gpus=shares_gpus,
        rollout=Processes(
            role="rollout",
            count=rollout_count,
            cpus=cpus,
            gpus=placement.rollout_gpus * config.rollouts.tensor_parallel / half,
            threads=rollout_threads,
            engine=config.rollouts.engine,
            labels=placement.labels_of("learner") if shares_gpus else placement.labels_of("rollout"),
        ),
        reward=Processes(
            role="reward",
            count=reward_count,
            cpus=cpus,
            gpus=placement.reward_gpus,
            threads=reward_threads,
            labels=placement.labels_of("reward"),
        ),
        learner=Processes(
            role="learner",
            count=learner_count,
            cpus=cpus,
            gpus=placement.learner_gpus / half,
            threads=learner_threads,
            labels=placement.labels_of("learner"),
        ),
    )


def join_cluster(config: RunConfig) -> tuple[int, int]:
    """Join the configured Ray cluster, or start a local one; return the run's CPUs and those of the smallest node.

    Ray's token authentication is left on, and a local dashboard listens on the loopback interface only.

    Raises:
        PlacementError: when the cluster was started here, so that no node will join it, and has too few GPUs.
    """
    import ray

    if not ray.is_initialized():
        on_sigterm = signal.getsignal(signal.SIGTERM)
        context = ray.init(
            address=config.placement.address,
            namespace="concord",
            log_to_driver=bool(os.environ.get("CONCORD_WORKER_LOGS")),
            logging_level=logging.WARNING,
        )
        interrupt_on_sigterm()  # Ray has put a handler of its own there
        if callable(on_sigterm) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
        placement = config.placement
        has_gpus = bool(placement.rollout_gpus or placement.reward_gpus or placement.learner_gpus)
        if has_gpus and _is_own(context):
            check_gpus(config, ray.cluster_resources().get("GPU", 0.0))
    cpus, node_cpus = cluster_cpus()
    trial = enclosing_group()
    return (cpus if trial is None else trial_cores(trial.bundle_specs)), node_cpus


def cluster_cpus() -> tuple[int, int]:
    """Return the CPUs of the cluster and of its smallest node."""
    import ray

    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return max(1, sum(nodes)), min((count for count in nodes if count), default=1)


def enclosing_group() -> Any:
    """Return the placement group that Ray puts this process's own processes into: a Tune trial's; None elsewhere.

    What has no bundle there waits without an end and without a word.
    """
    import ray

    if not ray.get_runtime_context().should_capture_child_tasks_in_placement_group:
        return None
    from ray.util.placement_group import get_current_placement_group

    return get_current_placement_group()


def trial_cores(bundles: Sequence[Mapping[str, float]]) -> int:
    """Return the cores that a trial's bundles stand for: 3 bundles of 0.66 CPUs are 2 cores that 3 processes share."""
    return max(1, math.ceil(sum(bundle.get("CPU", 0.0) for bundle in bundles) - 1e-6))


def _is_own(context: Any) -> bool:
    """Return whether this process has started the cluster; one that was joined may still grow."""
    session: str = context.address_info["session_dir"]
    return session.endswith(f"_{os.getpid()}")  # Ray names a session after the process that starts it


def check_gpus(config: RunConfig, available: float) -> None:
    """Refuse a run whose processes, which all live at once, want more GPUs than there are.

    Raises:
        PlacementError: naming what each role wants and what is available.
    """
    placement = config.placement
    # A worker that shares a GPU with a rank wants none beside it.
    rollout_gpus = 0.0 if placement.shares_gpus else placement.rollout_gpus
    wanted = {
        "rollout_gpus": (config.rollouts.num_workers * config.rollouts.tensor_parallel, rollout_gpus),
        "reward_gpus": (config.reward.num_workers, placement.reward_gpus),
        "learner_gpus": (config.learner.num_ranks, placement.learner_gpus),
    }
    total = round(sum(count * gpus for count, gpus in wanted.values()), 4)  # Ray's own grain
    if total > available:
        each = ", ".join(f"placement.{name} {gpus:g} x {count}" for name, (count, gpus) in wanted.items() if gpus)
        raise PlacementError(
            f"GPUs of all processes must be at most the {available:g} available, got {total:g} wanted ({each}); lower "
            "them, or join a cluster that has them with placement.address"
        )


def interrupt_on_sigterm() -> None:
    """Make a request to end (a preemption, a stopped job) what Ctrl-C is: processes end, records are closed."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
