"""Processes that do the work: independent workers in a pool, ranks that live and die together in a gang.

All of Ray's actor handling is here; the wrapped classes are plain and know nothing of Ray.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.placement import PlacementError, Processes, place_gang


class WorkerError(RuntimeError):
    """A worker process failed, died or missed its deadline; the message names it and what it was doing."""


def fetch(references: Any, *, what: str, timeout_s: float | None) -> Any:
    """Return the values behind references; without a deadline where `timeout_s` is None.

    Raises:
        WorkerError: naming `what`, when the call failed, its process died or the deadline passed.
    """
    try:
        return ray.get(references, timeout=timeout_s)
    except RayTaskError as error:
        raise WorkerError(f"{what} failed: {type(error.cause).__name__}: {error.cause}") from error
    except RayActorError as error:
        raise WorkerError(f"{what} failed because its process died: {_essence(error)}") from error
    except GetTimeoutError as error:
        raise WorkerError(
            f"{what} must finish within {timeout_s:g} s and did not; raise pipeline.timeout_s if it is just slow"
        ) from error
    except RayError as error:
        raise WorkerError(f"{what} failed: {type(error).__name__}: {error}") from error


def _essence(error: RayActorError) -> str:
    """Return the line that says what happened: the last one of a traceback, the first one otherwise."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    is_traceback = any(line.startswith(('File "', "Traceback")) for line in lines)
    return lines[-1 if is_traceback else 0] if lines else type(error).__name__


class WorkerPool:
    """Independent workers of one role; each call goes to the one with the fewest calls in flight."""

    def __init__(self, worker_class: type, arguments: Mapping[str, Any], processes: Processes) -> None:
        self.role = processes.role
        actor_class: Any = ray.remote(worker_class)
        self.workers: list[Any] = [
            actor_class.options(**processes.options()).remote(**arguments) for _ in range(processes.count)
        ]
        self._in_flight = [0] * processes.count

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until every worker answers.

        Raises:
            PlacementError: when some have no place or are not ready in time.
        """
        waiting = [worker.ping.remote() for worker in self.workers]
        ready, late = ray.wait(waiting, num_returns=len(waiting), timeout=timeout_s)
        fetch(ready, what=f"starting the {self.role} workers", timeout_s=timeout_s)  # a failure explains the late ones
        if late:
            raise PlacementError(
                f"{len(late)} of {len(waiting)} {self.role} workers must be ready within {timeout_s:g} s and are not; "
                f"the cluster has {ray.available_resources()} free of {ray.cluster_resources()}; add nodes or raise "
                "placement.ready_timeout_s"
            )

    def take(self) -> int:
        """Return the index of the worker to call next, and count the call."""
        index = min(range(len(self.workers)), key=self._in_flight.__getitem__)
        self._in_flight[index] += 1
        return index

    def give_back(self, index: int) -> None:
        """Say that a call to a worker has ended."""
        self._in_flight[index] -= 1

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            ray.kill(worker)


class Gang:
    """Ranks of one process group, in one placement group; one call goes to all of them."""

    def __init__(
        self,
        rank_class: type,
        arguments: Callable[[int], Mapping[str, Any]],
        processes: Processes,
        *,
        ready_timeout_s: float,
    ) -> None:
        self._placement_group = place_gang(processes, timeout_s=ready_timeout_s)
        try:
            address, port = self._rendezvous()
        except BaseException:
            remove_placement_group(self._placement_group)
            raise
        actor_class: Any = ray.remote(rank_class)
        self.ranks: list[Any] = []
        for rank in range(processes.count):
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": "0",  # Ray shows each rank only its own GPU
                "WORLD_SIZE": str(processes.count),
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
            }
            options = processes.options() | {
                "runtime_env": {"env_vars": processes.environment | variables},
                "scheduling_strategy": self._strategy(rank),
            }
            self.ranks.append(actor_class.options(**options).remote(**arguments(rank)))

    def call(self, references: Sequence[Any], *, what: str, timeout_s: float) -> list[Any]:
        """Return every rank's answer, in rank order; the first failure of any rank ends the wait for the others."""
        waiting = list(references)
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=timeout_s)
            if not ready:
                raise WorkerError(f"{what} must finish within {timeout_s:g} s and did not; raise pipeline.timeout_s")
            fetch(ready, what=what, timeout_s=timeout_s)
        answers: list[Any] = fetch(list(references), what=what, timeout_s=timeout_s)
        return answers

    def close(self) -> None:
        """End the processes and free their places."""
        for rank in self.ranks:
            ray.kill(rank)
        remove_placement_group(self._placement_group)

    def _strategy(self, bundle: int) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self._placement_group, placement_group_bundle_index=bundle)

    def _rendezvous(self) -> tuple[str, int]:
        """Return an address of rank 0's node and a port that is free there."""
        # The bundle's own node answers; a single node stays on the loopback interface.
        is_alone = len(ray.nodes()) == 1
        task = ray.remote(num_cpus=0, scheduling_strategy=self._strategy(0))(_address_and_free_port)
        answer: tuple[str, int] = fetch(task.remote(is_alone), what="finding rank 0's address", timeout_s=120)
        return answer


def _address_and_free_port(is_alone: bool) -> tuple[str, int]:
    import socket

    address = "127.0.0.1" if is_alone else ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, probe.getsockname()[1]
