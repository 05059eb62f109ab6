"""Which group is worked on where, and what follows when a worker answers, fails, dies or stays silent.

Pure: replies and the time go in, commands for the workers come out, in the same order for the same input.  It is the
machine that runs and the machine that is simulated.

A group's way: waiting -> leased to a rollout worker that has the newest weights -> judged by a reward worker ->
finished.  A call that is late takes its worker down with it: the worker is killed, all its calls are forgotten, its
groups go to the front of the queue with the same identity, hence the same randomness.  An answer to a forgotten call is
thrown away and counted, so no result is taken twice.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from actors.streams import StreamOffer
from cluster.calls import Calls, Heartbeats, Pending
from cluster.distribution import Distribution
from cluster.fleet import Fleet, FleetConfig, FleetError, Member, MemberState, NotReadyError
from cluster.ledger import Ledger
from cluster.limits import Limits
from cluster.messages import Call, Command, Failure, FailureKind, Kill, Lease, Role, Start, Verb, Weights, WorkerId
from cluster.rounds import Group, Queue, Round
from cluster.usage import FleetUsage

_FIRST_RETRY_S = 0.5

_SICK = 2
"""So many failures of the machinery in a row on one worker are the worker's fault."""


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
        self.distribution = Distribution(self.fleets[Role.ROLLOUT])
        self._limits = limits
        self._ledger = ledger
        self._rounds: dict[Any, Round] = {}
        self._waiting = Queue()
        self._generated = Queue()
        self.calls = Calls()
        self._heartbeats = Heartbeats(limits.heartbeat_s / 2, self.fleets[Role.ROLLOUT], self.calls)
        self._commands: list[Command] = []
        self._notes: list[str] = []
        self._counters: Counter[str] = Counter()
        self._num_calls = 0
        self._num_groups = 0
        self._largest_group = 0
        self.usage = FleetUsage(self.fleets)
        self.stats: dict[WorkerId, dict[str, float]] = {}
        """What each process said of itself last."""

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
        return all(fleet.is_ready for fleet in self.fleets.values())

    @property
    def depths(self) -> dict[str, float]:
        """Return where the groups of all rounds are, and how many bytes of rollouts wait for their batch."""
        rounds = self._rounds.values()
        return {
            "queue_waiting": float(len(self._waiting)),
            "queue_generating": float(self.calls.num(Verb.GENERATE)),
            "queue_unjudged": float(len(self._generated)),
            "queue_ready": float(sum(len(round_.finished) for round_ in rounds)),
            "buffer_bytes": float(sum(round_.num_bytes for round_ in rounds)),
        }

    def ask_stats(self, now: float) -> None:
        """Ask every worker that is up for its counters, unless it still owes them."""
        for fleet in self.fleets.values():
            for member in fleet.members:
                if member.state is MemberState.UP and not self.calls.owes(member.worker, Verb.STATS):
                    self._call(member.worker, Verb.STATS, None, now)

    def publish(self, weights: Weights, publication: Any, now: float, *, base: Weights | None = None) -> None:
        """Make a publication the one that every group is generated with from now on.

        Args:
            weights: what it holds.
            publication: what workers are given to load it; None while it is offered to some of them, see `offer`.
            now: seconds.
            base: what a worker must sample from to be able to take it on; None = anything.
        """
        self.distribution.publish(weights, publication, base=base)
        self._dispatch(now)

    def offer(
        self, weights: Weights, make: Callable[[tuple[str, ...]], StreamOffer], now: float, *, base: Weights | None
    ) -> StreamOffer | None:
        """Offer weights that are about to be broadcast to the workers that can take part; None where none can.

        Others, and those for whom it fails, want them another way: see `Distribution.is_wanted`.
        """
        offer, members = self.distribution.offer(weights, make, base=base)
        if offer is not None:
            for member in members:
                self._load(member, weights, offer.seat(str(member.worker)), now)
        self._dispatch(now)
        return offer

    def grow(self, count: int, now: float) -> None:
        """Start up to so many more rollout workers: the cluster has room for them."""
        self.fleets[Role.ROLLOUT].grow(count)
        self._dispatch(now)

    @property
    def is_resting(self) -> bool:
        """Whether workers that were sent to rest have still to give their memory back."""
        return self.distribution.is_resting or self.calls.num(Verb.SLEEP) > 0

    def rest(self, now: float) -> None:
        """Have every rollout worker give its memory back; each takes on the newest weights when there is work."""
        self.distribution.rest()
        self._dispatch(now)

    def admit(self, round_id: Any, groups: Mapping[str, Any], ledger: Ledger, now: float, *, rank: int = 0) -> None:
        """Take groups (id -> work) into a round, which begins with its first ones; see `Round.rank`."""
        round_ = self._rounds.setdefault(round_id, Round(rank=rank))
        for group_id, work in groups.items():
            ledger.accept(group_id, step=rank or None)
            round_.num_open += 1
            group = Group(group_id=group_id, order=(rank, self._num_groups), work=work, round=round_, ledger=ledger)
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
        pending = self.calls.pop(call_id)
        if pending is None:
            self._counters["num_fenced"] += not isinstance(answer, Failure)
        elif isinstance(answer, Failure):
            self._failed(pending, answer, now)
        else:
            self._succeeded(pending, answer, now)
        self._dispatch(now)

    def tick(self, now: float) -> None:
        """Look at the clock: deadlines, backoffs, heartbeats."""
        for worker, verb in self.calls.late(now).items():
            self._counters["num_deadlines"] += 1
            fleet = self.fleets[worker.role]
            if verb is Verb.READY and fleet.is_first(worker):
                late = f"worker {worker} must be ready within {fleet.config.ready_timeout_s:g} s and is not"
                self._stop(NotReadyError(late))
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
        yield from (at for at in (self.calls.next_deadline(), self._heartbeats.next()) if at is not None)
        yield from self._waiting.wakeups()
        for fleet in self.fleets.values():
            yield from fleet.wakeups()

    # What an answer changes.

    def _succeeded(self, pending: Pending, answer: Any, now: float) -> None:
        call, group = pending.call, pending.group
        fleet = self.fleets[call.worker.role]
        member = fleet.member(call.worker)
        assert member is not None, f"{call.worker} has calls in flight"
        member.heard_at = now
        if call.verb is Verb.READY:
            fleet.up(member, now)
        elif call.verb is Verb.LOAD:
            self.distribution.loaded(member)
        elif call.verb is Verb.STATS:
            self.stats[call.worker] = answer
        elif call.verb is Verb.PING:
            self._heartbeats.watch(member)
        if group is None:
            return
        member.num_groups -= 1
        fleet.succeeded(member)
        if call.verb is Verb.GENERATE:
            group.generated(answer, now)
            self._largest_group = max(self._largest_group, group.num_bytes)
            self._generated.add(group)
        else:
            group.finished(answer, now)

    def _failed(self, pending: Pending, failure: Failure, now: float) -> None:
        call, group = pending.call, pending.group
        member = self.fleets[call.worker.role].member(call.worker)
        assert member is not None, f"{call.worker} has calls in flight"
        if failure.kind is FailureKind.DIED or call.verb in (Verb.READY, Verb.PING, Verb.SLEEP):
            if group is not None:
                self.calls.add(pending)  # lost together with the worker's other calls
            self._lose(call.worker, failure.text, now)
            self._stop_if_unstartable(call, failure)
        elif call.verb is Verb.LOAD:
            self._counters["num_failed_loads"] += 1
            self.distribution.failed(member, failure.text)
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
        is_first = self.fleets[call.worker.role].is_first(call.worker)
        if call.verb is Verb.READY and failure.kind is FailureKind.DATA and is_first:
            self._stop(FleetError(f"the {call.worker.role} workers cannot start: {failure.text}"))

    def _lose_if_sick(self, member: Member, cause: str, now: float) -> None:
        """End a worker that fails again and again: the least busy one, it would draw every group.

        A judge may have reasons outside its process, so it is ended only where another one works.
        """
        fleet = self.fleets[member.worker.role]
        if member.num_sick >= _SICK and (member.worker.role is Role.ROLLOUT or fleet.has_healthy()):
            self._lose(member.worker, f"it failed {member.num_sick} times in a row, the last time: {cause}", now)

    def _lose(self, worker: WorkerId, cause: str, now: float) -> None:
        """Give up on a process: kill it, forget its calls, put its groups back."""
        fleet = self.fleets[worker.role]
        member = fleet.member(worker)
        if member is None:
            return
        self._commands.append(Kill(worker=worker))
        self._notes.append(fleet.died(member, cause, now))
        self.stats.pop(worker, None)
        lost = self.calls.of(worker)
        for pending in lost:
            self.calls.pop(pending.call.call_id)
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
            self._stop(self._limits.too_many_retries(group.group_id, cause))
        if backoff:  # what it was given may be what failed, so nothing of the attempt is kept
            group.discard_rollouts()
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
        group.quarantined(reason)
        self._notes.append(f"group {group.group_id} is quarantined: {reason}")
        if self._ledger.counts()["quarantined"] > self._limits.max_quarantined:
            self._stop(self._limits.too_many_quarantined(group.group_id, reason))

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
        for member in self.distribution.take_suspects():
            self._lose_if_sick(member, member.load_failure, now)
        if self.distribution.target is not None and not self.distribution.lost:
            self._load_and_generate(self.distribution.target, now)
        for member in self.distribution.resters():
            self._call(member.worker, Verb.SLEEP, None, now)
        rewards = self.fleets[Role.REWARD]
        while self._generated and (judge := rewards.pick(None)) is not None:
            group = self._generated.pop()
            self._send(judge, Verb.SCORE, group, group.rollouts, now)
        for worker in self._heartbeats.due(now):
            self._call(worker, Verb.PING, None, now, timeout_s=self._limits.heartbeat_s)
        self.usage.observe(self.distribution.target, is_held_back=self._is_held_back(), now=now)

    def _is_held_back(self) -> bool:
        """Whether the group whose turn it is must wait until the learner has taken rollouts out of the buffer.

        What is being generated is counted with the size of the largest group so far.  The first open step's groups are
        never held back, so that its batch gets whole.
        """
        if not len(self._waiting) or self._waiting.first.round.rank <= min(r.rank for r in self._rounds.values()):
            return False
        buffered = sum(round_.num_bytes for round_ in self._rounds.values())
        return buffered + (self.calls.num(Verb.GENERATE) + 1) * self._largest_group > self._limits.max_buffer_bytes

    def _load_and_generate(self, target: Weights, now: float) -> None:
        rollouts = self.fleets[Role.ROLLOUT]
        has_use = bool(self._waiting) or not self._limits.loads_late
        for member in self.distribution.loaders() if has_use else ():
            self._load(member, target, self.distribution.publication, now)
        while self._waiting and not self._is_held_back() and (free := rollouts.pick(target)) is not None:
            self._generate(self._waiting.pop(), free, target, now)

    def _load(self, member: Member, weights: Weights, payload: Any, now: float) -> None:
        member.loading = weights
        self._call(member.worker, Verb.LOAD, payload, now)

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
        self._heartbeats.watch(member)
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
        self.calls.add(Pending(call=call, group=group, sent_at=now, deadline=deadline))
        self._commands.append(call)
