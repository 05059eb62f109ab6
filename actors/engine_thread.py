"""One thread that owns an engine: commands go in from an asyncio loop, futures come out, errors as futures too.

Commands are applied between two decoding steps, and groups that are in flight together are decoded together.

A worked example: groups a, b, an update to version 4, and group c arrive in this order.  With updates of mode drain, a
and b are decoded with version 3 until both are done, then the weights change, then c starts with version 4.  With keep
and reprefill the weights change before the next decoding step, and the rest of a and b is of version 4.
"""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actors.engine import Completion, Engine, Request, UpdateMode
from actors.faults import fault
from actors.memory import give_back
from actors.streams import IncomingStream
from actors.weights import Fetched


class RolloutError(RuntimeError):
    """A group could not be generated, through no fault of its prompt; another worker may succeed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Reply:
    """Where a caller waits: a future, which only its own loop may touch."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]

    def succeed(self, answer: Any) -> None:
        self._on_loop(self.future.set_result, answer)

    def fail(self, error: Exception) -> None:
        self._on_loop(self.future.set_exception, error)

    def _on_loop(self, settle: Callable[[Any], None], outcome: Any) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(lambda: None if self.future.done() else settle(outcome))


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Generate a group; answered by its completions in order of sample index."""

    request: Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Forget a group whose caller went away; never answered."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Take new weights; an update that fails in the middle leaves the engine still until another one succeeds."""

    incoming: Fetched | IncomingStream
    mode: UpdateMode
    """What becomes of the groups before it: see `Engine.begin_update`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Answered by the engine's counters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sleep:
    """Give memory back until the next update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """End the thread."""


Command = Generate | Abort | Update | Stats | Sleep | Close


@dataclass(slots=True, kw_only=True)
class _Pending:
    """A group in the engine; complete when `completions` has one per sample."""

    request: Request
    reply: _Reply
    completions: list[Completion]


class EngineThread:
    """Owns an engine: the only thread that calls it.  Commands go in, futures come out, errors as futures too."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[tuple[Command, _Reply]] = queue.SimpleQueue()
        self._waiting: deque[tuple[Command, _Reply]] = deque()  # in order of arrival; an update holds back what follows
        self._pending: dict[str, _Pending] = {}
        self._closed = threading.Event()
        self._num_asked = 0  # calls that wait for an answer; only their loop touches these two
        self._asked_at = 0.0  # when the first of them began to wait
        self._turn_at = 0.0  # when the last decoding step or command ended
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def version(self) -> int:
        """The engine's policy version."""
        return self._engine.version

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more commands."""
        return self._closed.is_set()

    @property
    def stalled_s(self) -> float:
        """Seconds since the engine's last turn (a decoding step, a command), 0 while nobody waits; for the loop only.

        Example: idle until 100 s, a group asked for at 100 s, its last step at 103 s: 7 at 110 s.
        """
        return time.monotonic() - max(self._asked_at, self._turn_at) if self._num_asked else 0.0

    @property
    def _is_decoding(self) -> bool:
        """Whether the engine has samples to decode, and weights to decode them with."""
        return self._engine.has_work and not self._engine.is_updating

    async def ask(self, command: Command) -> Any:
        """Queue a command and wait for its answer."""
        loop = asyncio.get_running_loop()
        reply = _Reply(loop=loop, future=loop.create_future())
        if self._num_asked == 0:
            self._asked_at = time.monotonic()
        self._num_asked += 1
        self._inbox.put((command, reply))
        if self._closed.is_set():  # after the put, so that a command cannot slip in behind the last look at the inbox
            self._fail_all(RolloutError("the rollout worker must be open to take calls, but it has ended"))
        try:
            return await reply.future
        except asyncio.CancelledError:
            if isinstance(command, Generate):
                self._inbox.put((Abort(request_id=command.request.request_id), reply))
            raise
        finally:
            self._num_asked -= 1

    def _run(self) -> None:
        try:
            self._serve()
        finally:  # whatever ended the thread, nobody waits for it for ever
            self._closed.set()
            self._fail_all(RolloutError("the rollout worker ended before this call was answered; issue it again"))

    def _serve(self) -> None:
        while not self._closed.is_set():
            self._take_commands(block=not self._is_decoding and not self._waiting)
            while self._waiting and not self._closed.is_set():
                command, reply = self._waiting[0]
                if isinstance(command, Update) and command.mode == "drain" and self._is_decoding:
                    break  # live groups finish with the version they began with
                self._waiting.popleft()
                self._apply_safely(command, reply)
            self._step_safely()

    def _take_commands(self, *, block: bool) -> None:
        while block or not self._inbox.empty():
            command, reply = self._inbox.get()
            block = False
            if isinstance(command, Generate | Update | Sleep):
                self._waiting.append((command, reply))
            else:  # these do not wait for an update
                self._apply_safely(command, reply)

    def _apply_safely(self, command: Command, reply: _Reply) -> None:
        try:
            self._apply(command, reply)
        except Exception as error:  # the caller gets it, whatever it is; the engine goes on with the other groups
            reply.fail(_picklable(error))
        finally:
            self._turn_at = time.monotonic()

    def _apply(self, command: Command, reply: _Reply) -> None:
        match command:
            case Generate(request=request):
                self._engine.submit([request])
                self._pending[request.request_id] = _Pending(request=request, reply=reply, completions=[])
            case Abort(request_id=request_id):
                self._waiting = deque(item for item in self._waiting if item[1] is not reply)
                if request_id in self._pending and self._pending[request_id].reply is reply:
                    del self._pending[request_id]
                    self._engine.abort([request_id])
            case Update(incoming=incoming, mode=mode):
                incoming.load_into(self._engine, mode)
                reply.succeed(None)
            case Stats():
                reply.succeed(self._engine.stats())
            case Sleep():
                self._engine.sleep()
                give_back()
                reply.succeed(None)
            case Close():
                self._closed.set()
                reply.succeed(None)

    def _step_safely(self) -> None:
        if not self._is_decoding:
            return
        try:
            fault("rollout.decode")
            completions = self._engine.step()
        except Exception as error:  # every group in flight is lost, the thread and its callers are not
            self._lose_groups(error)
            return
        finally:
            self._turn_at = time.monotonic()
        for completion in completions:
            pending = self._pending[completion.request_id]
            pending.completions.append(completion)
            if len(pending.completions) == pending.request.num_samples:
                del self._pending[completion.request_id]
                pending.reply.succeed(sorted(pending.completions, key=lambda c: c.sample_index))

    def _lose_groups(self, error: Exception) -> None:
        lost, self._pending = self._pending, {}
        for request_id, pending in lost.items():
            pending.reply.fail(RolloutError(f"generation failed ({request_id}): {type(error).__name__}: {error}"))
        self._engine.abort(list(lost))

    def _fail_all(self, error: Exception) -> None:
        for pending in self._pending.values():
            pending.reply.fail(error)
        replies = [reply for _, reply in self._waiting]
        while not self._inbox.empty():
            replies.append(self._inbox.get_nowait()[1])
        for reply in replies:
            reply.fail(error)


def _picklable(error: Exception) -> Exception:
    """Return the error itself where one of our own kinds says it best, else its text."""
    if isinstance(error, ValueError) or type(error).__module__.startswith("actors."):
        return error
    return RolloutError(f"the rollout worker failed: {type(error).__name__}: {error}")
