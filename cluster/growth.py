"""More rollout workers where a cluster has room for them: `rollouts.max_workers`.

Room is on nodes of which nobody used anything when the run began, and on those that join later: the cores of the others
are shared out already, whatever Ray's books say of them.  What a worker takes there is what it keeps busy.

Example: 2 workers with 2 threads each, max_workers 6.  A node of 4 cores joins: room for 2, slots 2 and 3 are started.
It is removed: both slots are absent again, until another node joins.
"""

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from ray.exceptions import RayError

from cluster.bundles import Node, capacity
from cluster.hardware import live_nodes_by_id
from cluster.placement import Processes

_EVERY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """A living node of a cluster."""

    total: Node
    free: Node

    @property
    def is_unused(self) -> bool:
        """Whether nobody has any of its cores or GPUs."""
        return (self.free.cpus, self.free.gpus) == (self.total.cpus, self.total.gpus)


def live_views() -> dict[str, NodeView]:
    """Return the living nodes of the Ray cluster that this process has joined, by id."""
    total, free = live_nodes_by_id(), live_nodes_by_id(free=True)
    return {name: NodeView(total=node, free=free[name]) for name, node in total.items() if name in free}


def rooms(processes: Processes, nodes: Mapping[str, NodeView], used: frozenset[str]) -> dict[str, int]:
    """Return for each node that has room for workers how many it has room for.

    Args:
        processes: what one of them wants.
        nodes: those that live, by id.
        used: ids of those whose cores are shared out already.
    """
    cpus, gpus = processes.busy_cpus, processes.gpus
    found = {
        name: capacity(node.free, cpus=cpus, gpus=gpus, labels=processes.labels)
        for name, node in nodes.items()
        if name not in used
    }
    return {name: count for name, count in found.items() if count}


class Growth:
    """Looks at the cluster every few seconds, in a thread of its own.

    Args:
        processes: the rollout workers.
        look: returns the living nodes by id.
        grow: told the ids of nodes with room, and for how many workers it is.
        every_s: between two looks, seconds.
    """

    def __init__(
        self,
        processes: Processes,
        look: Callable[[], Mapping[str, NodeView]],
        grow: Callable[[list[str], int], None],
        *,
        every_s: float = _EVERY_S,
    ) -> None:
        self._processes = processes
        self._look = look
        self._grow = grow
        self._every_s = every_s
        self._used = frozenset(name for name, node in look().items() if not node.is_unused)
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="growth", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._is_closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_closing.is_set():
            found: dict[str, int] = {}
            with suppress(RayError, ConnectionError, TimeoutError):  # Ray's control store is away: look again later
                found = rooms(self._processes, self._look(), self._used)
            if found:
                self._grow(sorted(found), sum(found.values()))
            self._is_closing.wait(self._every_s)
