"""The pipeline's inside: prompts become leases, leases become judged groups, judged groups become batches.

Owns the prompt order, the ledger and the dispatcher, and tells the workers what the dispatcher decides.  Everything
happens in the one thread that calls `advance`; requests and answers arrive through one queue.
"""

import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from actors.prompts import DrawnPrompt
from actors.streams import StreamOffer
from cluster.config import RunConfig
from cluster.dispatcher import Dispatcher
from cluster.draws import Draws, Place, Prompts
from cluster.groups import Batch, held_out_work, training_work
from cluster.ledger import GroupState, Ledger, LedgerJournal
from cluster.limits import DataError, fleets, limits
from cluster.messages import Kill, Start, Weights, Workers
from cluster.open_round import OpenRound
from cluster.processes import ProcessStatus, process_figures, worker_processes
from cluster.rounds import Round
from cluster.waves import NO_CONTRAST, Waves

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""

_DRAWN_AT_ONCE = 256
"""Prompts drawn before answers are looked at again."""

_FLUSH_S = 0.5
"""Transitions wait at most so long for their transaction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    future: "Future[Any]"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    call_id: int
    value: Any


class PipelineCore:
    """See the module.  Methods are called in the pipeline's thread, `ask` in any.

    Args:
        config: the run's.
        prompts: of training; nobody else draws from it.
        workers: the processes.
        ledger: of training.
        journal: told every transition.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        prompts: Prompts,
        workers: Workers,
        ledger: Ledger,
        journal: LedgerJournal,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._draws = Draws(prompts)
        self._workers = workers
        self._ledger = ledger
        self._journal = journal
        self._clock = clock
        self._dispatcher = Dispatcher(fleets=fleets(config), limits=limits(config), ledger=ledger)
        self._inbox: queue.SimpleQueue[_Request | _Answer] = queue.SimpleQueue()
        self._rounds: dict[Any, OpenRound] = {}
        self._ready: Future[None] = Future()
        self._rested: Future[None] = Future()
        self._flushed_at = clock()
        self._has_news = False
        self._is_drawing = False  # more prompts are to be drawn at once
        self.on_progress: Progress = lambda what, done, total: None
        self.say: Callable[[str], None] = lambda text: None
        """Told, one line each, what goes wrong with workers and groups."""
        self.on_processes: Callable[[list[ProcessStatus]], None] | None = None
        """Shown what the workers do, after something has happened."""
        self._dispatcher.tick(clock())

    def ask(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Have a method called in the pipeline's thread; a future that it returns is passed on."""
        future: Future[Any] = Future()
        self._inbox.put(_Request(function=function, arguments=arguments, future=future))
        return future

    def advance(self, longest_wait_s: float | None = None) -> None:
        """Wait for something to happen, at most until the dispatcher's next look at the clock, and deal with it."""
        self._execute()
        for item in self._arrived(self._wait_s(longest_wait_s)):
            self._has_news = True
            if isinstance(item, _Answer):
                self._dispatcher.replied(item.call_id, item.value, self._clock())
            else:
                self._serve(item)
        self._dispatcher.tick(self._clock())
        self._execute()
        self._settle_rounds()
        for note in self._dispatcher.take_notes():
            self.say(note)
        if self._has_news and self._clock() - self._flushed_at >= _FLUSH_S:
            self.flush()

    def ready(self) -> "Future[None]":
        """Return a future for all workers being up; it fails when one cannot start."""
        self._ready = Future()
        return self._ready

    def batch(self, step: int) -> "Future[Batch]":
        """Return a future for a step's batch.

        Prompts are drawn for it and for the steps after it, as many as staleness allows, where they are not yet.  It
        fails when the pipeline cannot go on; asked again after a remedy, it goes on.
        """
        last = min(step + self._config.pipeline.max_staleness, self._config.run.num_steps)
        for opened in range(step, max(step, last) + 1):
            if opened not in self._rounds:
                self._open_round(opened)  # its prompts are drawn in pieces, so that answers are not kept waiting
        return self._when_done(step)

    def evaluation(self, version: int, prompts: Sequence[DrawnPrompt]) -> "Future[Batch]":
        """Return a future for the judged answers to held-out prompts; see `batch`."""
        name = ("evaluation", version)
        if name not in self._rounds:
            self._rounds[name] = OpenRound(step=0, num_wanted=0)
            works = [held_out_work(self._config, prompt) for prompt in prompts]
            self._dispatcher.admit(name, {work.group_id: work for work in works}, Ledger(), self._clock())
        return self._when_done(name)

    def publish(self, weights: Weights, publication: Any, base: Weights | None = None) -> None:
        """Make weights the ones that everything is generated with from now on; see `Dispatcher.publish`."""
        self._dispatcher.publish(weights, publication, self._clock(), base=base)

    def offer(
        self, weights: Weights, make: Callable[[tuple[str, ...]], StreamOffer], base: Weights | None
    ) -> StreamOffer | None:
        """Make weights that are about to be broadcast the newest; see `Dispatcher.offer`."""
        return self._dispatcher.offer(weights, make, self._clock(), base=base)

    def grow(self, count: int) -> None:
        """Start up to so many more rollout workers; see `Dispatcher.grow`."""
        self._dispatcher.grow(count, self._clock())

    def rest(self) -> "Future[None]":
        """Return a future for every rollout worker having given its memory back; see `Dispatcher.rest`."""
        self._rested = Future()
        self._dispatcher.rest(self._clock())
        return self._rested

    def replay(self, batch: Batch) -> None:
        """Account for a batch that was read from the redo log, as if it had been generated now."""
        for identity, reason in batch.quarantined.items():
            self._ledger.accept(identity, batch.step)
            self._ledger.end(identity, GroupState.QUARANTINED, reason)
        leases = batch.after["leases"]
        for identity, reason in batch.dropped.items():
            self._ledger.accept(identity, batch.step)
            self._ledger.replay(identity, leases[identity], batch.step, left_out=reason)
        for identity in batch.group_ids:
            self._ledger.accept(identity, batch.step)
            self._ledger.replay(identity, leases[identity], batch.step)
        self._draws.seek(batch.after["prompts"])

    def settle(self, batch: Batch, dropped: str | None) -> dict[str, int]:
        """End a batch's groups, TRAINED or DROPPED for a reason; return the ledger's counts, which must add up."""
        for identity in batch.group_ids:
            if dropped is None:
                self._ledger.train(identity, batch.step)
            else:
                self._ledger.end(identity, GroupState.DROPPED, dropped)
        self.flush()
        return self._ledger.counts()

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for the checkpoint: how things stand without the rounds that are open.

        Their groups will be drawn again, so to the snapshot they have not happened yet.
        """
        open_rounds = {step: self._rounds[step] for step in self._open_steps()}
        failed = [self._dispatcher.round(step).quarantined for step in open_rounds]
        pending = {group_id: None for open_round in open_rounds.values() for group_id in open_round.drawn}
        return {
            "prompts": self._draws.position(self._places(after=0)),
            "ledger": self._ledger.snapshot(without={**pending, **{k: v for some in failed for k, v in some.items()}}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a checkpoint stopped."""
        self._draws.seek(state["prompts"])
        self._ledger.restore(state["ledger"])

    def counts(self) -> dict[str, int]:
        """Return the ledger's counts."""
        return self._ledger.counts()

    def fault_counts(self) -> dict[str, int]:
        """Return how often things went wrong in this process's life, by name."""
        return self._dispatcher.counters

    def usage(self) -> dict[str, float]:
        """Return metrics of the time since the last call: what idle workers waited for, queues, memory by worker.

        Workers are asked for their memory for the next time.
        """
        now = self._clock()
        figures = self._dispatcher.depths | self._dispatcher.usage.take_metrics(now)
        for worker, stats in self._dispatcher.stats.items():
            figures[f"resident_mb_{worker.role}_{worker.slot}"] = stats["resident_bytes"] / 2**20
        self._dispatcher.ask_stats(now)
        return figures

    def process_figures(self) -> dict[str, float]:
        """Return figures of single workers, busy shares those of the last `usage`."""
        return process_figures(self._dispatcher)

    def flush(self) -> None:
        """Give the journal what has happened, and show what the workers do now."""
        self._flushed_at, self._has_news = self._clock(), False
        transitions = self._ledger.take_transitions()
        if transitions:
            self._journal.append(transitions, time.time())
        if self.on_processes is not None:
            self.on_processes(worker_processes(self._dispatcher, self._flushed_at))

    def close(self) -> None:
        """End all workers, and the journal, whatever either says."""
        try:
            self._workers.close()
        finally:
            try:
                self.flush()
            finally:
                self._journal.close()

    def fail(self, error: BaseException) -> None:
        """Let nobody wait for ever: everything that is asked or waited for fails."""
        _fail(self._ready, error)
        _fail(self._rested, error)
        for open_round in self._rounds.values():
            _fail(open_round.waiter, error)
        for item in self._arrived(0.0):
            if isinstance(item, _Request):
                _fail(item.future, error)

    def next_wakeup(self) -> float | None:
        """Return when the clock must be looked at, None = only an answer or a request can change anything."""
        return self._clock() if self._is_drawing else self._dispatcher.next_wakeup()

    def _when_done(self, name: Any) -> "Future[Batch]":
        waiter: Future[Batch] = Future()
        self._rounds[name].waiter = waiter
        return waiter

    def _serve(self, request: _Request) -> None:
        try:
            result = request.function(*request.arguments)
        except Exception as error:  # the one who asked gets it, whatever it is
            request.future.set_exception(error)
        else:
            request.future.set_result(result)

    def _wait_s(self, longest_wait_s: float | None) -> float | None:
        wakeup = self.next_wakeup()
        waits = [] if wakeup is None else [max(0.0, wakeup - self._clock())]
        if self._has_news:
            waits.append(max(0.0, self._flushed_at + _FLUSH_S - self._clock()))
        return min([*waits, *([] if longest_wait_s is None else [longest_wait_s])], default=None)

    def _arrived(self, wait_s: float | None) -> Iterator[_Request | _Answer]:
        """Yield what is there, after waiting for the first."""
        try:
            yield self._inbox.get(block=wait_s != 0.0, timeout=wait_s or None)
            while True:
                yield self._inbox.get_nowait()
        except queue.Empty:
            return

    def _execute(self) -> None:
        for command in self._dispatcher.take_commands():
            if isinstance(command, Start):
                self._workers.start(command.worker)
            elif isinstance(command, Kill):
                self._workers.kill(command.worker)
            else:
                self._workers.call(command, self._reply)

    def _reply(self, call_id: int, answer: Any) -> None:
        self._inbox.put(_Answer(call_id=call_id, value=answer))

    def _open_round(self, step: int) -> None:
        num_places, sampling = self._config.rollouts.prompts_per_step, self._config.algorithm.dynamic_sampling
        waves = None if sampling is None else Waves(config=sampling, num_places=num_places)
        self._rounds[step] = OpenRound(step=step, num_wanted=num_places, waves=waves)
        self._dispatcher.admit(step, {}, self._ledger, self._clock(), rank=step)

    def _draw(self, step: int, count: int) -> None:
        works = {}
        for draw in self._draws.draw(count):
            work = training_work(self._config, draw.prompt)
            works[work.group_id] = work
            self._rounds[step].drawn[work.group_id] = draw
        self._dispatcher.admit(step, works, self._ledger, self._clock(), rank=step)

    def _open_steps(self) -> list[int]:
        return sorted(open_round.step for open_round in self._rounds.values() if open_round.num_wanted)

    def _places(self, *, after: int) -> list[Place]:
        """Return where the prompts are that were drawn for the steps after one, in the order of steps."""
        steps = [step for step in self._open_steps() if step > after]
        return [draw.place for step in steps for draw in self._rounds[step].drawn.values()]

    def _settle_rounds(self) -> None:
        if self._dispatcher.error is not None:
            _fail(self._ready, self._dispatcher.error)
            _fail(self._rested, self._dispatcher.error)
        elif self._dispatcher.is_ready and not self._ready.done():
            self._ready.set_result(None)
        if not (self._dispatcher.is_resting or self._rested.done()):
            self._rested.set_result(None)
        room = _DRAWN_AT_ONCE
        for name, open_round in list(self._rounds.items()):
            round_ = self._dispatcher.round(name)
            num_missing = open_round.num_missing(round_)
            if num_missing > 0 and self._dispatcher.error is None:
                count = min(num_missing, room)
                self._draw(name, count)
                self._execute()
                room -= count
                if count < num_missing:
                    break
            if open_round.waiter is not None:
                self._settle_round(name, open_round, round_)
        self._is_drawing = room == 0

    def _settle_round(self, name: Any, open_round: OpenRound, round_: Round) -> None:
        assert open_round.waiter is not None, "somebody waits for the round"
        self.on_progress("groups", len(round_.finished), len(round_.finished) + round_.num_open)
        error = self._dispatcher.error
        if error is None and round_.is_done and not round_.finished:
            error = DataError(f"at least one group must be answered, and all failed: {round_.quarantined}")
        if error is None and not round_.is_done:
            error = self._dispatcher.distribution.hindrance()
        if error is not None:
            open_round.waiter, waiter = None, open_round.waiter
            _fail(waiter, error)
        elif round_.is_done:
            batch = self._batch(open_round, self._dispatcher.close_round(name))
            del self._rounds[name]  # after the batch is made: until then `fail` finds the waiter here
            open_round.waiter.set_result(batch)

    def _batch(self, open_round: OpenRound, round_: Round) -> Batch:
        position = self._draws.position(self._places(after=open_round.step))
        after = {"prompts": position, "leases": round_.leases, "quarantined": round_.quarantined}
        identities = sorted(round_.finished)
        if open_round.waves is not None:
            chosen, dropped = open_round.waves.choose(list(open_round.drawn))
            identities, after["dropped"] = sorted(chosen), dict.fromkeys(dropped, NO_CONTRAST)
            for identity in dropped:
                self._ledger.leave_out(identity, open_round.step, NO_CONTRAST)
        if open_round.num_wanted:
            for identity in identities:
                self._ledger.batch(identity, open_round.step)
        return Batch(
            step=open_round.step,
            group_ids=tuple(identities),
            tables=tuple(round_.finished[identity][0] for identity in identities),
            samples=pa.concat_tables([round_.finished[identity][1] for identity in identities]),
            generate_s=round_.last_generated_at - (round_.first_lease_at or 0.0),
            score_s=round_.last_finished_at - round_.last_generated_at,
            finished_at=round_.last_finished_at,
            after=after,
        )


def _fail(future: "Future[Any] | None", error: BaseException) -> None:
    if future is not None and not future.done():
        future.set_exception(error)
