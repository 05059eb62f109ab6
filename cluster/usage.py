"""How the workers of a fleet spend their time, and what those that do nothing wait for.  Pure.

0 s  rollout-0 gets a group: busy       4 s  its group is done, and no other may be started: idle, for the learner
6 s  the learner has published          6 s  it takes on the new weights
7 s  it gets a group                    10 s take(): busy 0.7, learner 0.2, weights 0.1
"""

from collections.abc import Mapping
from enum import StrEnum

from cluster.fleet import Fleet, Member, MemberState
from cluster.messages import Role, Weights


class Activity(StrEnum):
    """What a worker does, or what keeps it from working."""

    BUSY = "busy"
    STARTING = "starting"
    """Its process is not up."""
    WEIGHTS = "weights"
    """It takes on new weights, or waits for some."""
    LEARNER = "learner"
    """No group may be started: those of the steps within the staleness allowed are all on their way."""
    BUFFER = "buffer"
    """No group may be started: too many bytes of rollouts wait for the learner."""
    ROLLOUTS = "rollouts"
    """There is nothing to judge."""
    IDLE = "idle"
    """It waits for what its fleet waits for."""


Seconds = dict[Activity, float]


def activity_of(member: Member, target: Weights | None) -> Activity:
    """Return what a worker does; one that should sample from `target` and does not waits for weights, None = any do."""
    if member.state is not MemberState.UP:
        return Activity.STARTING
    if member.num_groups:
        return Activity.BUSY
    if member.loading is not None or (target is not None and member.weights != target):
        return Activity.WEIGHTS
    return Activity.IDLE


class Usage:
    """Clocks of one fleet's slots.

    Args:
        count: slots.
        reason: what idle workers wait for, for the present.
        now: seconds.
    """

    def __init__(self, count: int, reason: Activity, now: float) -> None:
        self._activities = [Activity.STARTING] * count
        self._since = [now] * count
        self._idle_from: list[Seconds] = [{} for _ in range(count)]
        self._spent: list[Seconds] = [{} for _ in range(count)]
        self._reason = reason
        self._reason_since = now
        self._reasons: Seconds = {}
        """How long the fleet has waited for each reason, whoever was idle."""
        self._taken_at = now

    def wait_for(self, reason: Activity, now: float) -> None:
        """Say what idle workers wait for from now on."""
        if reason is not self._reason:
            self._reasons = self._waited(now)
            self._reason, self._reason_since = reason, now

    @property
    def reason(self) -> Activity:
        """What idle workers wait for now."""
        return self._reason

    def observe(self, slot: int, activity: Activity, now: float) -> None:
        """Say what a slot's worker does from now on."""
        if activity is not self._activities[slot]:
            self._close(slot, now)
            self._activities[slot] = activity

    def take(self, now: float) -> list[dict[str, float]]:
        """Return, for each slot, the share of the time since the last call by activity; they sum to 1."""
        elapsed = now - self._taken_at
        self._taken_at = now
        shares = []
        for slot, spent in enumerate(self._spent):
            self._close(slot, now)
            shares.append({str(name): seconds / elapsed for name, seconds in spent.items() if seconds > 0 < elapsed})
            spent.clear()
        return shares

    def _waited(self, now: float) -> Seconds:
        return self._reasons | {self._reason: self._reasons.get(self._reason, 0.0) + now - self._reason_since}

    def _close(self, slot: int, now: float) -> None:
        """Add what a slot's worker has done since it was looked at last."""
        waited, before, spent = self._waited(now), self._idle_from[slot], self._spent[slot]
        done: Seconds = {self._activities[slot]: now - self._since[slot]}
        if self._activities[slot] is Activity.IDLE:
            done = {name: seconds - before.get(name, 0.0) for name, seconds in waited.items()}
        for name, seconds in done.items():
            spent[name] = spent.get(name, 0.0) + seconds
        self._idle_from[slot], self._since[slot] = waited, now


_REASONS = {
    Role.ROLLOUT: (Activity.STARTING, Activity.WEIGHTS, Activity.LEARNER, Activity.BUFFER),
    Role.REWARD: (Activity.STARTING, Activity.ROLLOUTS),
}
"""What a role's workers may wait for."""


class FleetUsage:
    """The clocks of both fleets."""

    def __init__(self, fleets: Mapping[Role, Fleet]) -> None:
        self._fleets = fleets
        self._usages: dict[Role, Usage] = {}
        self.busy: dict[tuple[Role, int], float] = {}
        """Role and slot -> share of the time before the last `take_metrics` in which the worker had groups."""

    def observe(self, target: Weights | None, *, is_held_back: bool, now: float) -> None:
        """Note what every worker does from now on.

        Args:
            target: the newest weights.
            is_held_back: whether the next group must wait for room in the buffer.
            now: seconds.
        """
        for role, fleet in self._fleets.items():
            usage = self._usages.setdefault(role, Usage(len(fleet.members), Activity.ROLLOUTS, now))
            if role is Role.ROLLOUT:
                usage.wait_for(Activity.BUFFER if is_held_back else Activity.LEARNER, now)
            for member in fleet.take_changed():
                activity = activity_of(member, target if role is Role.ROLLOUT else None)
                usage.observe(member.worker.slot, activity, now)

    def reason(self, role: Role) -> Activity:
        """Return what a role's idle workers wait for now."""
        return self._usages[role].reason

    def take_metrics(self, now: float) -> dict[str, float]:
        """Return shares of the time since the last call.

        `idle_<role>_<reason>` is the mean over the role's workers, `idle_<role>_max` the idle share of the idlest one.
        """
        figures: dict[str, float] = {}
        for role, usage in self._usages.items():
            members = self._fleets[role].members
            present = [member.state is not MemberState.ABSENT for member in members]
            by_slot = {slot: share for slot, share in enumerate(usage.take(now)) if present[slot]}
            self.busy = {key: share for key, share in self.busy.items() if key[0] is not role}
            self.busy |= {(role, slot): share.get("busy", 0.0) for slot, share in by_slot.items()}
            shares = by_slot.values()
            for reason in _REASONS[role]:
                total = sum(share.get(str(reason), 0.0) for share in shares)
                figures[f"idle_{role}_{reason}"] = total / max(1, len(shares))
            figures[f"idle_{role}_max"] = max((1.0 - share.get("busy", 0.0) for share in shares), default=0.0)
        return figures


def learner_idle(step_s: float, *, waited_s: float, publish_s: float) -> dict[str, float]:
    """Return which shares of a step the learner's ranks waited for rollouts, and sent weights instead of learning."""
    return {"idle_learner_rollouts": waited_s / step_s, "idle_learner_weights": publish_s / step_s}
