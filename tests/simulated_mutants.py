"""Planted bugs that the simulation must find: each a context in which one rule of the real code is broken."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from actors.rollout_worker import Lease
from cluster.dispatcher import Dispatcher
from cluster.fleet import Fleet, Member, MemberState
from cluster.groups import Work
from cluster.messages import Failure, Verb, Weights
from cluster.pipeline_core import PipelineCore
from cluster.redo import RedoLog
from cluster.run import Run
from tests.simulated_waves import judged_at_arrival, places_by_arrival

_LIVE = "live_ledger.json"


@contextmanager
def late_reply_accepted() -> Iterator[None]:
    """The answer to a call that was given up counts for its group."""
    call, replied = Dispatcher._call, Dispatcher.replied
    remembered: dict[tuple[int, int], Any] = {}

    def remembering_call(self: Dispatcher, *arguments: Any, **options: Any) -> None:
        call(self, *arguments, **options)
        remembered[id(self), self._num_calls] = self.calls._calls[self._num_calls]

    def accepting_replied(self: Dispatcher, call_id: int, answer: Any, now: float) -> None:
        pending = None if call_id in self.calls._calls else remembered.pop((id(self), call_id), None)
        if pending is None or pending.group is None or isinstance(answer, Failure):
            replied(self, call_id, answer, now)
            return
        group = pending.group
        if pending.call.verb is Verb.GENERATE:
            group.ledger.generated(group.group_id, group.lease.lease_id)
            group.rollouts = answer
            self._generated.add(group)
        else:
            group.ledger.scored(group.group_id, group.lease.lease_id)
            group.round.finished[group.group_id] = answer
            group.round.num_open -= 1

    with patch.object(Dispatcher, "_call", remembering_call), patch.object(Dispatcher, "replied", accepting_replied):
        yield


@contextmanager
def fencing_off() -> Iterator[None]:
    """Weights of another incarnation are taken for the newest ones if their version is the same."""
    pick = Fleet.pick

    def is_newest(member: Member, weights: Weights) -> bool:
        return member.weights is not None and member.weights.version == weights.version

    def careless_pick(self: Fleet, weights: Weights | None) -> Member | None:
        same = (member.weights for member in self.members if weights and is_newest(member, weights))
        return next(filter(None, (pick(self, other) for other in {*same, weights})), None)

    def careless_outdated(self: Fleet, target: Weights) -> list[Member]:
        up = (member for member in self.members if member.state is MemberState.UP and member.loading is None)
        return [member for member in up if not is_newest(member, target)]

    with patch.object(Fleet, "pick", careless_pick), patch.object(Fleet, "outdated", careless_outdated):
        yield


@contextmanager
def trained_before_checkpoint() -> Iterator[None]:
    """A resume believes a ledger that is newer than the checkpoint."""
    record, restore = Run.record, Run._restore

    def durable_record(self: Run, step: int, *arguments: Any) -> Any:
        metrics = record(self, step, *arguments)
        self.storage.write_text(json.dumps({"step": step, "pipeline": self.pipeline.state_dict()}), _LIVE)
        return metrics

    def credulous_restore(self: Run, step: int, directory: str) -> None:
        restore(self, step, directory)
        if self.storage.exists(_LIVE):
            state: Mapping[str, Any] = json.loads(self.storage.read_text(_LIVE))
            if state["step"] > step:
                self.step = self.learner.step_done = state["step"]
                self.pipeline.load_state_dict(state["pipeline"])

    with patch.object(Run, "record", durable_record), patch.object(Run, "_restore", credulous_restore):
        yield


@contextmanager
def new_seed_on_another_attempt() -> Iterator[None]:
    """A group that is leased again gets other random numbers."""
    order = Work.lease
    attempts: Counter[int] = Counter()
    kept: list[Work] = []  # so that no other work gets the same id

    def fresh_order(self: Work, lease_id: int, incarnation: int) -> Lease:
        kept.append(self)
        attempts[id(self)] += 1
        lease = order(self, lease_id, incarnation)
        return replace(lease, seed=lease.seed + attempts[id(self)] - 1)

    with patch.object(Work, "lease", fresh_order):
        yield


@contextmanager
def redo_after_step() -> Iterator[None]:
    """A batch is written when its step is recorded, not before the learner sees it."""
    write, record = RedoLog.write, Run.record
    waiting: dict[int, Any] = {}

    def late_write(self: RedoLog, batch: Any, rows: Any) -> None:
        waiting[batch.step] = (self, batch, rows)

    def writing_record(self: Run, step: int, *arguments: Any) -> Any:
        log, *what = waiting.pop(step, (None,))
        if log is self.redo:
            write(log, *what)
        return record(self, step, *arguments)

    with patch.object(RedoLog, "write", late_write), patch.object(Run, "record", writing_record):
        yield


@contextmanager
def replay_without_dropped() -> Iterator[None]:
    """A batch from the redo log does not account for the groups that were dropped for it."""
    replay = PipelineCore.replay

    def forgetful_replay(self: PipelineCore, batch: Any) -> None:
        replay(self, replace(batch, after={**batch.after, "dropped": {}}))

    with patch.object(PipelineCore, "replay", forgetful_replay):
        yield


@contextmanager
def turn_taken_before_it_is_given() -> Iterator[None]:
    """Rollout workers are asked to give their memory back, and the learner does not wait until all have done so."""
    with patch.object(Dispatcher, "is_resting", False):
        yield


MUTANTS = {
    "late reply accepted": late_reply_accepted,
    "fencing off": fencing_off,
    "TRAINED durable before its checkpoint": trained_before_checkpoint,
    "lease re-issued with a new seed": new_seed_on_another_attempt,
    "redo log written after the step": redo_after_step,
    "group dropped when it arrives": judged_at_arrival,
    "places filled by arrival": places_by_arrival,
    "dropped groups forgotten by a replay": replay_without_dropped,
    "turn taken before it is given": turn_taken_before_it_is_given,
}
