"""Configuration of where processes run: their share of GPUs and threads, and which nodes they may be on."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from actors.config import Config, RolloutsConfig
from learner.config import LearnerConfig


class PlacementConfig(Config):
    """Resources of each process."""

    address: str | None = None
    """Ray cluster to join, e.g. `auto`; null joins RAY_ADDRESS's cluster or starts a local one."""
    rollout_gpus: float = Field(default=0.0, ge=0, le=1)
    """GPUs of each rollout worker, a share of one if below 1; with rollouts.tensor_parallel, of each part of one."""
    reward_gpus: float = Field(default=0.0, ge=0, le=1)
    """GPUs of each reward worker, a share of one if below 1."""
    learner_gpus: int = Field(default=0, ge=0, le=1)
    """GPUs of each learner rank."""
    by_role: bool = False
    """Only nodes whose Ray label `role` is a process's own: rollout, reward or learner, as in ray_cluster.yaml."""
    rollout_labels: dict[str, str] = {}
    """Labels of the nodes that rollout workers may be on: {role: rollout}; also `!value`, `in(a,b)`, `!in(a,b)`."""
    reward_labels: dict[str, str] = {}
    """Labels of the nodes that reward workers may be on."""
    learner_labels: dict[str, str] = {}
    """Labels of the nodes that learner ranks may be on."""
    cores: int = Field(default=0, ge=0)
    """CPU cores that all processes of the run share, where other runs want the rest; 0 = all of the cluster's."""
    rollout_threads: int = Field(default=0, ge=0)
    """torch threads of each rollout worker; 0 = the planner's choice."""
    reward_threads: int = Field(default=0, ge=0)
    """torch threads of each reward worker; 0 = the planner's choice."""
    learner_threads: int = Field(default=0, ge=0)
    """torch threads of each learner rank; 0 = the planner's choice."""
    colocated: bool = False
    """Rollout workers and learner take turns with the same memory: whoever does not work gives its own back. With GPUs,
    a rollout worker and a rank share each of them. For pipeline.max_staleness 0."""
    ready_timeout_s: float = Field(default=300.0, gt=0)
    """Longest wait for all processes to be placed and ready, seconds."""

    def labels_of(self, role: Literal["rollout", "reward", "learner"]) -> dict[str, str]:
        """Return the labels of the nodes that a role's processes may be on."""
        own: dict[str, str] = getattr(self, f"{role}_labels")
        return ({"role": role} if self.by_role else {}) | own

    @property
    def shares_gpus(self) -> bool:
        """Whether a rollout worker and a learner rank are on one GPU."""
        return self.colocated and bool(self.learner_gpus)


def placement_problems(placement: PlacementConfig, rollouts: RolloutsConfig, learner: LearnerConfig) -> Iterator[str]:
    """Yield what is wrong between the sections that say which processes there are and what each has."""
    if rollouts.engine == "vllm" and 0 < placement.rollout_gpus < 1:
        yield (
            f"placement.rollout_gpus must be 0 or 1 with rollouts.engine vllm, got {placement.rollout_gpus:g}: vLLM "
            "takes all of a GPU's memory; set 1, or engine torch"
        )
    if rollouts.engine == "vllm" and placement.shares_gpus:
        yield (
            "rollouts.engine must be torch with placement.colocated on GPUs, got vllm, which takes all of a GPU's "
            "memory; set engine torch, or give the learner GPUs of its own"
        )
    if rollouts.tensor_parallel > 1 and 0 < placement.rollout_gpus < 1:
        yield (
            f"placement.rollout_gpus must be 0 or 1 with rollouts.tensor_parallel {rollouts.tensor_parallel}, got "
            f"{placement.rollout_gpus:g}: each part of a replica has a GPU of its own"
        )
    if placement.colocated and bool(placement.rollout_gpus) != bool(placement.learner_gpus):
        yield (
            f"placement.rollout_gpus and placement.learner_gpus must both be 0 or both be 1 with placement.colocated, "
            f"got {placement.rollout_gpus:g} and {placement.learner_gpus}: they take turns with the same memory"
        )
    elif placement.shares_gpus and (placement.rollout_gpus < 1 or rollouts.tensor_parallel > 1):
        yield (
            "placement.rollout_gpus and rollouts.tensor_parallel must be 1 with placement.colocated on GPUs, got "
            f"{placement.rollout_gpus:g} and {rollouts.tensor_parallel}: one rollout worker and one rank share a GPU"
        )
    elif placement.shares_gpus and placement.rollout_labels:
        yield (
            f"placement.rollout_labels must be left out with placement.colocated on GPUs, got "
            f"{placement.rollout_labels}: rollout workers are where the ranks are; set learner_labels"
        )
    elif placement.shares_gpus and rollouts.max_workers is not None:
        yield (
            f"rollouts.max_workers must be left out with placement.colocated on GPUs, got {rollouts.max_workers}: one "
            "rollout worker and one rank share a GPU"
        )
    elif placement.shares_gpus and rollouts.num_workers != learner.num_ranks:
        yield (
            f"rollouts.num_workers must be learner.num_ranks = {learner.num_ranks} with placement.colocated on GPUs, "
            f"got {rollouts.num_workers}: one rollout worker and one rank share a GPU"
        )
