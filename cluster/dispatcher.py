"""Which group is worked on where, and what follows when a worker answers, fails, dies or stays silent.

Pure: replies and the time go in, commands for the workers come out, in the same order for the same input.  It is the
machine that runs and the machine that is simulated.

A group's way: waiting -> leased to a rollout worker that has the newest weights -> judged by a reward worker ->
finished.  A call that is late takes its worker down with it: the worker is killed, all its calls are forgotten, its
groups go to the front of the queue with the same identity, hence the same randomness.  An answer to a forgotten call is
thrown away and counted, so no result is taken twice.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.fleet import Fleet, FleetConfig, FleetError, Member, MemberState, NotReadyError
from cluster.ledger import GroupState, Ledger
from cluster.messages import Call, Command, Failure, FailureKind, Kill, Lease, Role, Start, Verb, Weights, WorkerId
from cluster.rounds import Group, Queue, Round

_FIRST_RETRY_S = 0.5

_SICK = 2
"""So many failures of the machinery in a row on one worker are the worker's fault."""


class RetriesError(RuntimeError):
    """The machinery failed a group more often than allowed; the message names the group, the failure and the remedy."""


class DataError(RuntimeError):
    """More groups than allowed failed through their own fault; the message names the last one and the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When the dispatcher loses patience."""

    timeout_s: float
    """Longest wait for one call, seconds."""
    heartbeat_s: float
    """A rollout worker that generates is asked after half of this time, and must answer within it, seconds."""
    max_retries: int
    """Failures of the machinery one group may meet."""
    max_quarantined: int
    """Groups a run may lose through their own fault."""


@dataclass(slots=True, kw_only=True)
class _Pending:
    call: Call
    group: Group | None
    deadline: float


class Dispatcher:
    """Decides; `take_commands` hands out what was decided.

    Args:
        fleets: both roles.
        limits: when to lose patience.
        ledger: of training; its quarantined groups are counted against the limit.
    """

    def __init__(self, *, fleets: Mapping[Role, FleetConfig], limits: Limits, ledger: Ledger) -> None:
        self.fleets = {role: Fleet(role, config) for role, config in fleets.items()}
        self.error: Exception | None = None
        """Why no more commands come."""
        self.weights_lost = ""
        """Why the newest publication cannot be fetched; empty while it can."""
        self._limits = limits
        self._ledger = ledger
        self._rounds: dict[Any, Round] = {}
        self._waiting = Queue()
        self._generated = Queue()
        self._calls: dict[int, _Pending] = {}
        self._commands: list[Command] = []
        self._notes: list[str] = []
        self._counters: Counter[str] = Counter()
        self._num_calls = 0
        self._num_groups = 0
        self._target: Weights | None = None
        self._publication: Any = None

    @property
    def counters(self) -> dict[str, int]:
        """Return how often things went wrong so far, by name."""
        names = ("num_retries", "num_fenced", "num_deadlines", "num_failed_loads")
        restarts = sum(fleet.num_restarts for fleet in self.fleets.values())
        given_up = sum(fleet.num_given_up for fleet in self.fleets.values())
        return {"num_restarts": restarts, "num_given_up": given_up, **{name: self._counters[name] for name in names}}

    @property
    def is_ready(self) -> bool:
        """Whether every worker is up, or given up while others of its role are there."""
        members = [member for fleet in self.fleets.values() for member in fleet.members]
        return all(member.state in (MemberState.UP, MemberState.GIVEN_UP) for member in members)

    def publish(self, weights: Weights, publication: Any, now: float) -> None:
        """Make a publication the one that every group is generated with from now on."""
        self._target, self._publication, self.weights_lost = weights, publication, ""
        for member in self.fleets[Role.ROLLOUT].members:
            member.load_failure = ""
        self._dispatch(now)

    def admit(self, round_id: Any, groups: Mapping[str, Any], ledger: Ledger, now: float) -> None:
        """Take groups (id -> work) into a round, which begins with its first ones."""
        round_ = self._rounds.setdefault(round_id, Round())
        for group_id, work in groups.items():
            ledger.accept(group_id)
            round_.num_open += 1
            group = Group(group_id=group_id, order=self._num_groups, work=work, round=round_, ledger=ledger)
            self._num_groups += 1
            self._waiting.add(group)
        self._dispatch(now)

    def round(self, round_id: Any) -> Round:
        """Return a round as it stands."""
        return self._rounds[round_id]

    def close_round(self, round_id: Any) -> Round:
        """Return a round that is done, and forget it."""
        assert self._rounds[round_id].is_done, f"round {round_id} has open groups"
        return self._rounds.pop(round_id)

    def replied(self, call_id: int, answer: Any, now: float) -> None:
        """Take an answer: a value or a `Failure`."""
        pending = self._calls.pop(call_id, None)
        if pending is None:
            self._counters["num_fenced"] += not isinstance(answer, Failure)
        elif isinstance(answer, Failure):
            self._failed(pending, answer, now)
        else:
            self._succeeded(pending, answer, now)
        self._dispatch(now)

    def tick(self, now: float) -> None:
        """Look at the clock: deadlines, backoffs, heartbeats."""
        late: dict[WorkerId, Verb] = {}
        for pending in self._calls.values():
            if pending.deadline <= now:
                late.setdefault(pending.call.worker, pending.call.verb)
        for worker, verb in late.items():
            self._counters["num_deadlines"] += 1
            if verb is Verb.READY and worker.life == 0:
                timeout_s = self.fleets[worker.role].config.ready_timeout_s
                self._stop(NotReadyError(f"worker {worker} must be ready within {timeout_s:g} s and is not"))
            self._lose(worker, f"it did not answer {verb!s} in time", now)
        self._dispatch(now)

    def next_wakeup(self) -> float | None:
        """Return when `tick` is due, None = only an answer can change anything."""
        return min(self._wakeups(), default=None)

    def take_commands(self) -> list[Command]:
        """Return what the workers must do now, in order."""
        commands, self._commands = self._commands, []
        return commands

    def take_notes(self) -> list[str]:
        """Return, one line each, what went wrong since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def _wakeups(self) -> Iterator[float]:
        if self.error is not None:
            return
        yield from (pending.deadline for pending in self._calls.values())
        yield from self._waiting.wakeups()
        for fleet in self.fleets.values():
            yield from fleet.wakeups()
        yield from (self._ping_at(member) for member in self._silent())

    # What an answer changes.

    def _succeeded(self, pending: _Pending, answer: Any, now: float) -> None:
        call, group = pending.call, pending.group
        fleet = self.fleets[call.worker.role]
        member = fleet.member(call.worker)
        assert member is not None, f"{call.worker} has calls in flight"
        member.heard_at = now
        if call.verb is Verb.READY:
            fleet.up(member, now)
        elif call.verb is Verb.LOAD:
            member.weights, member.loading = member.loading, None
            member.num_sick = 0
        if group is None:
            return
        member.num_groups -= 1
        fleet.succeeded(member)
        assert group.lease is not None, f"{group.group_id} has been leased"
        if call.verb is Verb.GENERATE:
            group.ledger.generated(group.group_id, group.lease.lease_id)
            group.rollouts = answer
            group.round.last_generated_at = now
            self._generated.add(group)
        else:
            group.ledger.scored(group.group_id, group.lease.lease_id)
            group.round.finished[group.group_id] = answer
            group.round.leases[group.group_id] = group.lease.lease_id
            group.round.last_finished_at = now
            group.round.num_open -= 1

    def _failed(self, pending: _Pending, failure: Failure, now: float) -> None:
        call, group = pending.call, pending.group
        member = self.fleets[call.worker.role].member(call.worker)
        assert member is not None, f"{call.worker} has calls in flight"
        if failure.kind is FailureKind.DIED or call.verb in (Verb.READY, Verb.PING):
            if group is not None:
                self._calls[call.call_id] = pending  # lost together with the worker's other calls
            self._lose(call.worker, failure.text, now)
            self._stop_if_unstartable(call, failure)
        elif call.verb is Verb.LOAD:
            self._counters["num_failed_loads"] += 1
            member.num_sick += 1
            if member.loading == self._target:
                member.load_failure = failure.text
            member.loading = None
        elif group is not None:
            member.num_groups -= 1
            member.heard_at = now
            if failure.kind is FailureKind.INFRA:
                member.num_sick += 1
                self._again(group, failure.text, now, backoff=True)
                self._lose_if_sick(member, failure.text, now)
            else:
                self._blame(group, call.verb, failure.text)

    def _stop_if_unstartable(self, call: Call, failure: Failure) -> None:
        """A constructor that raises the first time will raise again: say so at once."""
        if call.verb is Verb.READY and failure.kind is FailureKind.DATA and call.worker.life == 0:
            self._stop(FleetError(f"the {call.worker.role} workers cannot start: {failure.text}"))

    def _lose_if_sick(self, member: Member, cause: str, now: float) -> None:
        """End a worker that fails again and again: the least busy one, it would draw every group.

        A judge may have reasons outside its process, so it is ended only where another one works.
        """
        fleet = self.fleets[member.worker.role]
        if member.num_sick >= _SICK and (member.worker.role is Role.ROLLOUT or fleet.has_healthy()):
            self._lose(member.worker, f"it failed {member.num_sick} times in a row, the last time: {cause}", now)

    def _judge_loads(self, now: float) -> None:
        """What nobody has loaded and nobody can load is lost; where another has it, who failed twice in a row is sick.

        Once is no proof: the learner that published may have died since.  The worker waits for the next publication.
        """
        fleet = self.fleets[Role.ROLLOUT]
        failed = [member for member in fleet.members if member.load_failure]
        if any(member.weights == self._target for member in fleet.members if member.state is MemberState.UP):
            for member in failed:
                self._lose_if_sick(member, member.load_failure, now)
        elif failed and not any(member.loading == self._target for member in fleet.members):
            self.weights_lost = f"{failed[0].worker}: {failed[0].load_failure}"

    def _lose(self, worker: WorkerId, cause: str, now: float) -> None:
        """Give up on a process: kill it, forget its calls, put its groups back."""
        fleet = self.fleets[worker.role]
        member = fleet.member(worker)
        if member is None:
            return
        self._commands.append(Kill(worker=worker))
        self._notes.append(fleet.died(member, cause, now))
        lost = [pending for pending in self._calls.values() if pending.call.worker == worker]
        for pending in lost:
            del self._calls[pending.call.call_id]
        for pending in lost:
            if pending.group is not None:
                self._again(pending.group, f"{worker}: {cause}", now, backoff=False)
        if fleet.is_empty:
            self._stop(fleet.exhausted())

    def _again(self, group: Group, cause: str, now: float, *, backoff: bool) -> None:
        """Put a group back after a failure that was not its own: to be judged again where its rollouts are whole."""
        group.num_retries += 1
        self._counters["num_retries"] += 1
        if group.num_retries > self._limits.max_retries:
            error = RetriesError(
                f"group {group.group_id} must get through in {self._limits.max_retries + 1} attempts and did not; the "
                f"last failure was {cause}; mend the cause and resume, or raise pipeline.max_retries"
            )
            self._stop(error)
        if backoff:  # what it was given may be what failed, so nothing of the attempt is kept
            group.rollouts = None
            self._waiting.rest(group, until=now + _FIRST_RETRY_S * 2.0 ** (group.num_retries - 1))
        else:
            self._requeue(group)

    def _blame(self, group: Group, verb: Verb, text: str) -> None:
        """Take a failure of the group itself: once more, then it is quarantined."""
        if not group.data_failure:
            group.data_failure = text
            self._counters["num_retries"] += 1
            self._requeue(group)
            return
        reason = f"{verb}: {text}"
        group.ledger.end(group.group_id, GroupState.QUARANTINED, reason)
        group.round.quarantined[group.group_id] = reason
        group.round.num_open -= 1
        self._notes.append(f"group {group.group_id} is quarantined: {reason}")
        if self._ledger.counts()["quarantined"] > self._limits.max_quarantined:
            error = DataError(
                f"at most {self._limits.max_quarantined} groups may be quarantined, and group {group.group_id} is one "
                f"more: {reason}; mend prompts or judges, or raise pipeline.max_quarantined"
            )
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        self.error = self.error or error  # the first one is the cause

    def _requeue(self, group: Group) -> None:
        (self._waiting if group.rollouts is None else self._generated).add(group)

    # What is to be done now.

    def _dispatch(self, now: float) -> None:
        if self.error is not None:
            return
        for fleet in self.fleets.values():
            for worker in fleet.start(now):
                self._commands.append(Start(worker=worker))
                self._call(worker, Verb.READY, None, now, timeout_s=fleet.config.ready_timeout_s)
        self._waiting.wake(now)
        self._judge_loads(now)
        if self._target is not None and not self.weights_lost:
            self._load_and_generate(self._target, now)
        rewards = self.fleets[Role.REWARD]
        while self._generated and (judge := rewards.pick(None)) is not None:
            group = self._generated.pop()
            self._send(judge, Verb.SCORE, group, group.rollouts, now)
        for member in self._silent():
            if self._ping_at(member) <= now:
                self._call(member.worker, Verb.PING, None, now, timeout_s=self._limits.heartbeat_s)

    def _load_and_generate(self, target: Weights, now: float) -> None:
        rollouts = self.fleets[Role.ROLLOUT]
        for member in rollouts.outdated(target):
            member.loading = target
            self._call(member.worker, Verb.LOAD, self._publication, now)
        while self._waiting and (free := rollouts.pick(target)) is not None:
            self._generate(self._waiting.pop(), free, target, now)

    def _generate(self, group: Group, member: Member, target: Weights, now: float) -> None:
        lease_id = group.ledger.lease(
            group.group_id, worker=str(member.worker), version=target.version, incarnation=target.incarnation
        )
        group.lease = Lease(lease_id=lease_id, group_id=group.group_id, worker=member.worker, weights=target)
        if group.round.first_lease_at is None:
            group.round.first_lease_at = now
        self._send(member, Verb.GENERATE, group, group.work, now)

    def _send(self, member: Member, verb: Verb, group: Group, payload: Any, now: float) -> None:
        if member.num_groups == 0:
            member.heard_at = now  # an idle worker owes no answer
        member.num_groups += 1
        self._call(member.worker, verb, payload, now, group=group)

    def _call(
        self,
        worker: WorkerId,
        verb: Verb,
        payload: Any,
        now: float,
        *,
        timeout_s: float | None = None,
        group: Group | None = None,
    ) -> None:
        self._num_calls += 1
        lease = group.lease if group is not None else None
        call = Call(call_id=self._num_calls, worker=worker, verb=verb, payload=payload, lease=lease)
        deadline = now + (self._limits.timeout_s if timeout_s is None else timeout_s)
        self._calls[call.call_id] = _Pending(call=call, group=group, deadline=deadline)
        self._commands.append(call)

    def _ping_at(self, member: Member) -> float:
        return member.heard_at + self._limits.heartbeat_s / 2

    def _silent(self) -> list[Member]:
        """Return the rollout workers that generate and have no ping in flight."""
        pinged = {pending.call.worker for pending in self._calls.values() if pending.call.verb is Verb.PING}
        members = self.fleets[Role.ROLLOUT].members
        return [member for member in members if member.num_groups and member.worker not in pinged]
