"""Ranks: processes of one process group that live and die together, and the place that is kept for them.

Ray's handling of the learner's actors is here; what they do is `cluster/gang.py`'s.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.hardware import live_nodes
from cluster.placement import Processes, enclosing_group, gang_group
from cluster.places import ask_for
from cluster.pool import WorkerError, fetch

_LAST_WORDS_S = 1.0
"""When one rank fails, the others are heard for so long: a rank that lost its peer often reports before the peer."""


class GangError(WorkerError):
    """A rank failed, died or missed its deadline, so all of them are of no use any more.

    Args:
        message: what was going on, and what happened.
        cause: the exception that a rank raised, None where a process died or was late.
    """

    def __init__(self, message: str, cause: BaseException | None = None) -> None:
        super().__init__(message, cause)  # all arguments, so that the error can be pickled
        self.cause = cause

    def __str__(self) -> str:
        return str(self.args[0])


class GangPlace:
    """A placement group with a bundle for each rank, kept from one gang to the next as long as its nodes live.

    Inside a Tune trial it is the trial's, whose first bundles are the ranks'.

    Args:
        processes: the ranks.
        ready_timeout_s: longest wait for a place.
        guests: workers of which each shares a rank's bundle.
    """

    def __init__(self, processes: Processes, *, ready_timeout_s: float, guests: Processes | None = None) -> None:
        self.processes = processes
        self._guests = guests
        self._ready_timeout_s = ready_timeout_s
        self._group: Any = None

    def reserve(self) -> Any:
        """Return a placement group whose nodes live.

        Raises:
            PlacementError: when the cluster cannot hold it in time.
        """
        if (trial := enclosing_group()) is not None:
            return trial
        if self._group is not None and not self._is_whole():
            self.close()
        if self._group is None:
            wanted = gang_group(self.processes, guests=self._guests, nodes=live_nodes())
            self._group = ask_for(wanted, timeout_s=self._ready_timeout_s)
        return self._group

    def current(self) -> Any:
        """Return the placement group that is there now.

        Raises:
            ConnectionError: while there is none.
        """
        if self._group is None:
            raise ConnectionError("the learner's ranks must have a place before workers share it, and have none now")
        return self._group

    def close(self) -> None:
        """Free the place."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def _is_whole(self) -> bool:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        table = placement_group_table(self._group)
        return table["state"] == "CREATED" and set(table["bundles_to_node_id"].values()) <= alive


class Ranks:
    """The processes of one gang; one call goes to all of them.

    Args:
        rank_class: plain class, one object a process.
        arguments: rank -> its keyword arguments.
        place: where they run.
        group_timeout_s: longest wait of a rank for its peers.
        name: rank -> its name on Ray's dashboard.
    """

    def __init__(
        self,
        rank_class: type,
        arguments: Callable[[int], Mapping[str, Any]],
        place: GangPlace,
        *,
        group_timeout_s: float,
        name: Callable[[int], str],
    ) -> None:
        processes = place.processes
        self._group = place.reserve()
        address, port = self._rendezvous()
        actor_class: Any = ray.remote(rank_class)
        self.actors: list[Any] = []
        for rank in range(processes.count):
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": "0",  # Ray shows each rank only its own GPU
                "WORLD_SIZE": str(processes.count),
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
                "CONCORD_GROUP_TIMEOUT_S": str(group_timeout_s),
            }
            options = processes.options() | {
                "name": name(rank),
                "runtime_env": {"env_vars": processes.environment | variables},
                "scheduling_strategy": self._strategy(rank),
            }
            self.actors.append(actor_class.options(**options).remote(**arguments(rank)))

    def gather(
        self,
        references: Sequence[Any],
        *,
        what: str,
        timeout_s: float,
        remedy: str = "raise pipeline.timeout_s if it is just slow",
    ) -> list[Any]:
        """Return every rank's answer, in rank order.

        The first failure of any rank ends the wait for the others, and all of them have one deadline together, after
        which `remedy` says what to do.

        Raises:
            GangError: naming what was going on.
        """
        deadline = time.monotonic() + timeout_s
        waiting = list(references)
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = ", ".join(str(rank) for rank, call in enumerate(references) if call in waiting)
                raise GangError(f"{what} must finish within {timeout_s:g} s and did not on rank {late}; {remedy}")
            if (error := _failure(ready[0], what)) is not None:
                raise _clearest(error, waiting, what)
        try:
            answers: list[Any] = fetch(list(references), what=what, timeout_s=max(1.0, deadline - time.monotonic()))
        except WorkerError as error:
            raise GangError(str(error)) from error
        return answers

    def close(self) -> None:
        """End the processes; also those that hang or are stopped, which the node ends some seconds later."""
        for actor in self.actors:
            ray.kill(actor)

    def _strategy(self, bundle: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)

    def _rendezvous(self) -> tuple[str, int]:
        """Return an address of rank 0's node and a port that is free there."""
        # The bundle's own node answers; also a single node with the address that those see which may come later.
        task = ray.remote(num_cpus=0, scheduling_strategy=self._strategy(0))(_address_and_free_port)
        try:
            answer: tuple[str, int] = fetch(task.remote(), what="finding rank 0's address", timeout_s=120)
        except WorkerError as error:
            raise GangError(str(error)) from error
        return answer


def _failure(reference: Any, what: str) -> GangError | None:
    """Return why a call that has ended failed, None where it did not."""
    try:
        fetch(reference, what=what, timeout_s=None)
    except WorkerError as error:
        ray_error = error.__cause__
        failure = GangError(str(error), ray_error.cause if isinstance(ray_error, RayTaskError) else None)
        failure.__cause__ = ray_error
        return failure
    return None


def _clearest(error: GangError, waiting: Sequence[Any], what: str) -> GangError:
    """Return the failure that explains the others: the death of a process, if there is one."""
    deadline = time.monotonic() + _LAST_WORDS_S
    waiting = list(waiting)
    while waiting and not isinstance(error.__cause__, RayActorError):
        ready, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        other = _failure(ready[0], what)
        if other is not None and isinstance(other.__cause__, RayActorError):
            error = other
    return error


def _address_and_free_port() -> tuple[str, int]:
    import socket

    address = ray.util.get_node_ip_address()
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        return address, probe.getsockname()[1]
