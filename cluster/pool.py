"""Ray actors as the pipeline's workers, and what their failures mean.

The wrapped classes are plain and know nothing of Ray.  Nothing here waits for a worker or decides: calls go out,
answers come in on Ray's own thread, and when to kill, start again or retry is the dispatcher's business.  The one thing
waited for is Ray's control store, which registers the name of each new process (4 ms).
"""

import logging
import secrets
import textwrap
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Any, Protocol

import pyarrow as pa
import ray
import torch
from ray import exceptions
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from actors.rollout_worker import Lease, RolloutError
from actors.schema import to_stream
from cluster.messages import Call, Failure, FailureKind, Reply, Role, Verb, WorkerId
from cluster.placement import Processes

logger = logging.getLogger(__name__)

_LONGEST_TEXT = 600

# What a call to a process that is gone answers.  Ray's memory monitor kills the process, and each later call to it
# answers OutOfMemoryError again.
_GONE = (
    RayActorError,
    exceptions.LocalRayletDiedError,
    exceptions.NodeDiedError,
    exceptions.OutOfMemoryError,
    exceptions.OwnerDiedError,
    exceptions.WorkerCrashedError,
)
_MACHINERY = (
    RolloutError,
    TimeoutError,  # GetTimeoutError is one
    ConnectionError,
    MemoryError,
    torch.OutOfMemoryError,
    exceptions.ObjectLostError,
    exceptions.ObjectStoreFullError,
    exceptions.OutOfDiskError,
    exceptions.RpcError,
)


class WorkerError(RuntimeError):
    """A worker process failed, died or missed its deadline; the message names it and what it was doing."""


class GroupWork(Protocol):
    """What GENERATE brings: one prompt, and the order that an attempt at it gets."""

    @property
    def table(self) -> pa.Table:
        """PROMPTS, one row."""

    def lease(self, lease_id: int, incarnation: int) -> Lease:
        """Return one attempt's order."""


def unique_name(run: str) -> str:
    """Return a name for a run's processes: actors' names are unique on a cluster, and two runs may share one."""
    return f"{run}-{secrets.token_hex(3)}"


class RayWorkers:
    """The `Workers` of a run: one Ray actor for each process, restarted and retried by nobody but the dispatcher.

    Example: reward-1.2, the third process of slot 1, of the run "walks" is the actor "walks-3fa2c1/reward-1.2" on Ray's
    dashboard.  Its SCORE answers (reference to a SCORED table, SAMPLES table), or a `Failure`.

    Args:
        specs: role -> worker class, its constructor's arguments, and what its processes may use.
        run: a name for Ray's dashboard, which no other run on the cluster has, see `unique_name`.
        place: (role, slot) -> Ray's options for where a process goes.
    """

    def __init__(
        self,
        specs: Mapping[Role, tuple[type, Mapping[str, Any], Processes]],
        *,
        run: str,
        place: Callable[[str, int], Mapping[str, Any]] = lambda role, slot: {},
    ) -> None:
        self._place = place
        self._specs: dict[Role, tuple[Any, Mapping[str, Any], Processes]] = {
            role: (ray.remote(worker_class), arguments, processes)
            for role, (worker_class, arguments, processes) in specs.items()
        }
        self._run = run
        self._actors: dict[WorkerId, _Actor] = {}
        self._unstarted: dict[WorkerId, Failure] = {}

    def start(self, worker: WorkerId) -> None:
        """Create a process; whether Ray takes it, it has a place and comes up shows in its answer to READY."""
        actor_class, arguments, processes = self._specs[worker.role]
        try:
            _check_connected()
            where = self._place(str(worker.role), worker.slot)
            options = processes.options() | {"name": f"{self._run}/{worker}", **where}
            self._actors[worker] = _Actor(actor_class.options(**options).remote(**arguments))
        except Exception as error:  # whatever Ray raises when its control store is away
            self._unstarted[worker] = _unreachable(error)

    def kill(self, worker: WorkerId) -> None:
        """End a process, also one that is stopped; one that is gone already is no error.

        Its calls in flight answer at once.  A stopped process does not take the request, so Ray sends it SIGKILL 5 s
        later, and only then are its CPUs and GPUs free for the next life.  Where Ray refuses, the process ends after
        its handle, which is dropped here, at the latest with the run.
        """
        self._unstarted.pop(worker, None)
        actor = self._actors.pop(worker, None)
        if actor is None or not ray.is_initialized():  # Ray's end is the end of its processes
            return
        try:
            ray.kill(actor.handle)
        except Exception as error:  # whatever Ray raises when its control store is away
            logger.warning("%s could not be killed: %s", worker, _one_line(f"{type(error).__name__}: {error}"))

    def call(self, call: Call, reply: Reply) -> None:
        """Send a call; `reply` gets the value, or a pair of a reference to the large and the small value itself."""
        if call.worker in self._unstarted:
            reply(call.call_id, self._unstarted[call.worker])
            return
        try:
            _check_connected()
            *tables, answer = self._send(self._actors[call.worker], call)
            answered: Future[Any] = answer.future()
        except Exception as error:  # whatever Ray raises when its control store is away
            reply(call.call_id, _unreachable(error))
            return

        def settle(future: "Future[Any]") -> None:
            error = future.exception()
            if error is None:
                reply(call.call_id, (*tables, future.result()) if tables else future.result())
                return
            for table in tables:  # it holds the same error, and Ray prints errors that nobody has looked at
                table.future()
            reply(call.call_id, failure(error))

        answered.add_done_callback(settle)

    def close(self) -> None:
        """End all processes."""
        for worker in list(self._actors):
            self.kill(worker)

    def _send(self, actor: "_Actor", call: Call) -> Sequence[Any]:
        """Return the references to what the worker returns, the small one last."""
        match call.verb:
            case Verb.READY | Verb.PING:
                return [actor.handle.ping.remote()]
            case Verb.STATS:
                return [actor.handle.stats.remote()]
            case Verb.SLEEP:
                return [actor.handle.sleep.remote()]
            case Verb.LOAD:
                return [actor.handle.update_weights.remote(call.payload)]
            case Verb.SCORE:
                scored: Sequence[Any] = actor.score(call.payload[0])
                return scored
            case Verb.GENERATE:
                assert call.lease is not None, "a group is generated under a lease"
                work: GroupWork = call.payload
                lease = work.lease(call.lease.lease_id, call.lease.weights.incarnation)
                rollouts: Sequence[Any] = actor.generate(to_stream(work.table), lease)
                return rollouts


class _Actor:
    """A process, with its calls per group made ready: to look one up takes as long as to send it.

    Args:
        handle: Ray's.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    @cached_property
    def generate(self) -> Any:
        """Send GENERATE."""
        return self.handle.generate.options(num_returns=2).remote

    @cached_property
    def score(self) -> Any:
        """Send SCORE."""
        return self.handle.score.options(num_returns=2).remote


def _check_connected() -> None:
    if not ray.is_initialized():  # a call would start a cluster of its own
        raise ConnectionError("Ray is shut down")


def _unreachable(error: Exception) -> Failure:
    """Return what a call answers that Ray did not take."""
    return Failure(kind=FailureKind.DIED, text=_one_line(f"Ray refused: {type(error).__name__}: {error}"))


def failure(error: BaseException) -> Failure:
    """Return what an exception that Ray hands out says about a worker: gone, let down by the machinery, or at fault."""
    if isinstance(error, RayTaskError):  # the worker lives, and this is what it raised
        cause = error.cause
        kind = FailureKind.INFRA if isinstance(cause, _GONE + _MACHINERY) else FailureKind.DATA
        return Failure(kind=kind, text=_one_line(f"{type(cause).__name__}: {cause}"))
    if isinstance(error, RayActorError):
        kind = FailureKind.DATA if error.actor_init_failed else FailureKind.DIED
        return Failure(kind=kind, text=_one_line(_essence(error)))
    text = _one_line(f"{type(error).__name__}: {error}")
    if isinstance(error, _GONE):
        return Failure(kind=FailureKind.DIED, text=text)
    return Failure(kind=FailureKind.INFRA if isinstance(error, _MACHINERY) else FailureKind.DATA, text=text)


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
    """Return what a constructor raised, or why Ray says that the process is gone."""
    lines = str(error).splitlines() or [type(error).__name__]
    frames = [index for index, line in enumerate(lines) if line.startswith('  File "')]
    if error.actor_init_failed and frames:
        # A traceback: what was raised begins at the margin after the last frame and may have several lines.
        said = (index for index in range(frames[-1] + 1, len(lines)) if not lines[index].startswith(" "))
        return "\n".join(lines[next(said, -1) :])
    reasons = [line for line in lines if line.startswith("The actor is dead because")]
    return (reasons or lines)[0].partition(" Some common causes")[0]


def _one_line(text: str) -> str:
    """Return a text for messages and records: one line, no control characters, not too long."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return textwrap.shorten(text, _LONGEST_TEXT, placeholder=" ...")
