"""A configuration on hardware: where its processes go and what memory they take there."""

from dataclasses import dataclass

from cluster.bundles import Fit, Node, fit, has_labels
from cluster.config import RunConfig
from cluster.hardware import GB, Hardware
from cluster.memory_plan import ProcessMemory, Sizes, plan_memory
from cluster.placement import Placement, plan_placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A configuration on hardware."""

    config: RunConfig
    hardware: Hardware
    placement: Placement
    fits: tuple[Fit, ...]
    memory: tuple[ProcessMemory, ...]
    """Of each role; empty where the models' size is not known."""

    def nodes_of(self, role: str) -> list[Node]:
        """Return the nodes where a role's processes go; those where they may go where they have no place."""
        for found in self.fits:
            if found.group.role == self._bundle_role(role):
                chosen = [self.hardware.nodes[index] for index in found.nodes]
                return chosen or [n for n in self.hardware.nodes if has_labels(n.labels, found.group.labels)]
        return list(self.hardware.nodes[:1])

    def memory_of(self, role: str) -> ProcessMemory:
        """Return what a process of a role takes."""
        return next(memory for memory in self.memory if memory.role == role)

    def _bundle_role(self, role: str) -> str:
        return "learner" if role == "rollout" and self.placement.shares_gpus else role


def lay_out(config: RunConfig, hardware: Hardware, sizes: Sizes | None) -> Layout:
    """Place a run's processes and count their memory."""
    placement = plan_placement(config, cores=hardware.cores, node_cores=hardware.node_cores)
    fits = tuple(fit(placement.groups(hardware.nodes), hardware.nodes))
    memory = plan_memory(config, sizes) if sizes is not None else ()
    return Layout(config=config, hardware=hardware, placement=placement, fits=fits, memory=memory)


def device_need(layout: Layout, role: str) -> tuple[int, int | None]:
    """Return the bytes that a role's processes need of a GPU, and those that they may have of it; None = not known."""
    memory = layout.memory_of(role)
    sizes = [node.gpu_bytes for node in layout.nodes_of(role) if node.gpus]
    known = [size for size in sizes if size is not None]
    budget = min(known) if known and len(known) == len(sizes) else None
    need = memory.device_bytes
    if layout.placement.shares_gpus and role in ("rollout", "learner"):
        learner, rollout = layout.memory_of("learner"), layout.memory_of("rollout")
        held = () if layout.config.learner.rests_in_main_memory else ("weights", "optimizer")
        stays = learner.on_device(*held, "reference", "published", "process")
        need = max(learner.device_bytes + rollout.on_device("process"), stays + rollout.device_bytes)
    elif budget is not None:
        share = {"rollout": layout.placement.rollout, "reward": layout.placement.reward}.get(role)
        budget = int(budget * min(1.0, share.gpus)) if share is not None else budget
    return need, budget


def gigabytes(num_bytes: int) -> str:
    """Return e.g. `16.4 GB`, of 10^9 bytes, or `6.1 MB` where that is little."""
    return f"{num_bytes / GB:.1f} GB" if num_bytes >= GB / 20 else f"{num_bytes / 10**6:.1f} MB"
