"""What a run's processes ask of nodes, as bundles of resources, and whether nodes can hold them.  Pure.

A group is bundles that are alike.  The learner's ranks are on one node (STRICT_PACK) where one is large enough, else
on as few as possible (PACK): they talk to each other in every backward pass.  Rollout replicas keep apart (SPREAD), so
that a lost node takes few of them along; replicas of several GPUs fill node after node (PACK), so that no node is left
with too few GPUs for one.

A worked example, two nodes of 4 GPUs: 3 ranks go to node-0, of 2 replicas with 2 GPUs the first goes to node-1, and so
does the second; SPREAD would have put one on node-0, where it does not fit beside the ranks.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Strategy = Literal["STRICT_PACK", "PACK", "SPREAD"]

_GRAIN = 1e-6  # Ray counts in ten-thousandths


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine of a cluster; None is what is not known."""

    name: str
    cpus: float
    gpus: float = 0.0
    gpu_bytes: int | None = None
    """Memory of each GPU."""
    memory_bytes: int | None = None
    object_store_bytes: int | None = None
    """Of the memory, what Ray's object store may take."""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleGroup:
    """Bundles that are alike: each is one process's, or of a rank and the rollout worker that shares its GPU."""

    role: str
    count: int
    cpus: float
    gpus: float
    strategy: Strategy
    labels: Mapping[str, str] = field(default_factory=dict)
    """Selectors of nodes, see `has_labels`."""

    @property
    def resources(self) -> dict[str, float]:
        """Return a bundle as Ray writes it."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Where a group's bundles go: the index of a node for each of them; fewer than there are where not all fit."""

    group: BundleGroup
    nodes: tuple[int, ...]
    shortage: str
    """Why not all fit, and what to change; empty where they do."""


SETTINGS = {
    "rollout": ("rollouts.num_workers", "placement.rollout_gpus", "placement.rollout_labels"),
    "reward": ("reward.num_workers", "placement.reward_gpus", "placement.reward_labels"),
    "learner": ("learner.num_ranks", "placement.learner_gpus", "placement.learner_labels"),
}
"""Role -> the settings of its count, its GPUs and its nodes."""


def has_labels(labels: Mapping[str, str], selectors: Mapping[str, str]) -> bool:
    """Return whether a node has what is asked of it: `value`, `!value`, `in(a,b)` or `!in(a,b)`, as Ray reads them."""
    return all(_matches(labels.get(key), selector) for key, selector in selectors.items())


def capacity(node: Node, *, cpus: float, gpus: float, labels: Mapping[str, str]) -> int:
    """Return how many bundles with these resources a node has room for; none where it lacks the labels."""
    return _Room(node).holds(cpus=cpus, gpus=gpus) if has_labels(node.labels, labels) else 0


def gang_strategy(
    count: int, *, cpus: float, gpus: float, labels: Mapping[str, str], nodes: Sequence[Node]
) -> Strategy:
    """Return STRICT_PACK where one node is large enough for all ranks, else PACK."""
    for node in nodes:
        if capacity(node, cpus=cpus, gpus=gpus, labels=labels) >= count:
            return "STRICT_PACK"
    return "PACK"


def fit(groups: Sequence[BundleGroup], nodes: Sequence[Node]) -> list[Fit]:
    """Find a place for every bundle.

    Groups that must be on one node come first, then large bundles before small ones, so that what is easy to place does
    not take the room of what is not.  Greedy: rarely, bundles that would fit in another order are said not to.

    Args:
        groups: with a role each; a later one gets what earlier ones of the same size leave.
        nodes: with the resources that are there for them.

    Returns:
        A fit for each group, in the order of `groups`.
    """
    rooms = [_Room(node) for node in nodes]
    found: dict[int, Fit] = {}
    order = sorted(range(len(groups)), key=lambda index: _difficulty(groups[index]), reverse=True)
    for index in order:
        group = groups[index]
        before = [room.copy() for room in rooms]
        placed = tuple(_place(group, rooms))
        shortage = "" if len(placed) == group.count else _shortage(group, before, len(placed))
        found[index] = Fit(group=group, nodes=placed, shortage=shortage)
    return [found[index] for index in range(len(groups))]


def describe(nodes: Sequence[Node]) -> str:
    """Return e.g. `2 nodes with 8 CPUs and 4 GPUs (role=learner), 1 node with 4 CPUs`."""
    kinds: dict[str, int] = {}
    for node in nodes:
        gpus = f" and {node.gpus:g} GPUs" if node.gpus else ""
        own = ", ".join(f"{key}={value}" for key, value in node.labels.items() if not key.startswith("ray.io/"))
        kind = f"{node.cpus:g} CPUs{gpus}" + (f" ({own})" if own else "")
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{count} node{'s' * (count > 1)} with {kind}" for kind, count in kinds.items()) or "no node"


class _Room:
    """What is left of a node; GPU by GPU, as no process gets parts of two."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.cpus = node.cpus
        whole = int(node.gpus + _GRAIN)
        rest = node.gpus - whole
        self.gpus = [1.0] * whole + ([rest] if rest > _GRAIN else [])

    def copy(self) -> "_Room":
        """Return a room of its own."""
        other = _Room(self.node)
        other.cpus, other.gpus = self.cpus, list(self.gpus)
        return other

    @property
    def free_gpus(self) -> float:
        """Return the sum over the GPUs."""
        return sum(self.gpus)

    def take(self, *, cpus: float, gpus: float) -> bool:
        """Give a bundle its resources; return whether they were there."""
        chosen = self._choose(gpus)
        if self.cpus + _GRAIN < cpus or chosen is None:
            return False
        self.cpus -= cpus
        for index in chosen:
            self.gpus[index] -= min(gpus, 1.0)
        return True

    def holds(self, *, cpus: float, gpus: float) -> int:
        """Return how many such bundles there is room for."""
        if not (cpus or gpus):
            return sys.maxsize
        other, count = self.copy(), 0
        while other.take(cpus=cpus, gpus=gpus):
            count += 1
        return count

    def _choose(self, gpus: float) -> list[int] | None:
        """Return which GPUs a bundle gets: whole ones, or the fullest one that has the share left."""
        if gpus >= 1.0:
            whole = [index for index, free in enumerate(self.gpus) if free + _GRAIN >= 1.0]
            return whole[: round(gpus)] if len(whole) >= gpus - _GRAIN else None
        if not gpus:
            return []
        able = [index for index, free in enumerate(self.gpus) if free + _GRAIN >= gpus]
        return [min(able, key=lambda index: self.gpus[index])] if able else None


def _difficulty(group: BundleGroup) -> tuple[bool, float, float]:
    return group.strategy == "STRICT_PACK", group.gpus, group.cpus


def _place(group: BundleGroup, rooms: list[_Room]) -> Iterator[int]:
    """Yield the node of one bundle after the other, until one has no place; rooms shrink."""
    allowed = [index for index, room in enumerate(rooms) if has_labels(room.node.labels, group.labels)]
    own: dict[int, int] = dict.fromkeys(allowed, 0)
    size = {"cpus": group.cpus, "gpus": group.gpus}
    if group.strategy == "STRICT_PACK":
        # The smallest room that will do, so that larger ones stay whole.
        able = [index for index in allowed if rooms[index].holds(**size) >= group.count]
        allowed = sorted(able, key=lambda index: (rooms[index].free_gpus, rooms[index].cpus))[:1]
    for place in range(group.count):
        able = [index for index in allowed if rooms[index].copy().take(**size)]
        if not able:
            return
        if group.strategy == "SPREAD":
            best = min(able, key=lambda index: (own[index], -rooms[index].free_gpus, -rooms[index].cpus))
        else:
            best = max(able, key=lambda index: (own[index] > 0, min(rooms[index].holds(**size), group.count - place)))
        rooms[best].take(**size)
        own[best] += 1
        yield best


def _shortage(group: BundleGroup, rooms: Sequence[_Room], placed: int) -> str:
    """Return the first reason that holds, and the setting that it hangs on."""
    count_setting, gpu_setting, label_setting = SETTINGS[group.role]
    wanted = f"{group.count} x {_text(group.resources)}"
    allowed = [room for room in rooms if has_labels(room.node.labels, group.labels)]
    if not allowed:
        labels = ", ".join(f"{key}={value}" for key, value in group.labels.items())
        return (
            f"{label_setting} must be labels of some node, got {labels}, and there is {_describe_rooms(rooms)}; change "
            "it, or label nodes"
        )
    most_gpus = max(room.node.gpus for room in allowed)
    if group.gpus > most_gpus + _GRAIN:
        setting = "rollouts.tensor_parallel" if group.gpus > 1 else gpu_setting
        return f"{setting} must be at most the {most_gpus:g} GPUs of the largest node, got {group.gpus:g}; lower it" + (
            f" or set {gpu_setting}=0" if group.gpus <= 1 else ", or use larger nodes"
        )
    where = " on one node" if group.strategy == "STRICT_PACK" else ""
    return (
        f"{count_setting} must be at most {placed} here, got {group.count}: {wanted} are wanted{where}, and what is "
        f"left is {_describe_rooms(allowed)}; lower {count_setting} or {_share(group, gpu_setting)}, or add nodes"
    )


def _share(group: BundleGroup, gpu_setting: str) -> str:
    if not group.gpus:
        return "placement.cores" if group.cpus > 1 else "the other roles' processes"
    return "rollouts.tensor_parallel" if group.gpus > 1 else gpu_setting


def _describe_rooms(rooms: Sequence[_Room]) -> str:
    """Return `describe` of what is left."""
    return describe(
        [
            Node(name=room.node.name, cpus=round(room.cpus, 2), gpus=round(room.free_gpus, 2), labels=room.node.labels)
            for room in rooms
        ]
    )


def _text(resources: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name} {amount:g}" for name, amount in resources.items()) + "}"


def _matches(value: str | None, selector: str) -> bool:
    is_negated = selector.startswith("!")
    wanted = selector.removeprefix("!")
    choices = wanted[3:-1].split(",") if wanted.startswith("in(") and wanted.endswith(")") else [wanted]
    return (value in {choice.strip() for choice in choices}) != is_negated
