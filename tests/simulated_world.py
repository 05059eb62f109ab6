"""One schedule of the simulation: virtual time, seeded chance, and the notes that the verdict is taken from.

Everything random comes from one generator that is seeded with the schedule's seed, and nothing else decides: a seed is
a schedule.  What belongs to the data (malformed groups, non-finite losses) hangs on the data's own seed instead, and is
the same in the undisturbed run of the same data.
"""

import hashlib
import heapq
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

CHANCES = {
    "worker_death": 0.02,  # in the middle of a call
    "worker_hang": 0.01,
    "worker_cut_off": 0.01,  # reported dead while it lives on, and answers
    "reply_late": 0.02,  # after the deadline, the work done in time
    "reply_twice": 0.04,
    "reply_lost": 0.01,
    "infra_failure": 0.03,
    "data_failure": 0.03,  # once in the life of a group: the second attempt works
    "fetch_death": 0.03,  # while it takes new weights
    "fetch_failure": 0.02,
    "start_failure": 0.05,  # the process dies in its constructor
    "start_hang": 0.03,
    "start_error": 0.01,  # the constructor raises
    "rank_death_before_step": 0.04,
    "rank_death_after_step": 0.06,  # applied, not acknowledged
    "rank_hang": 0.03,
    "loss_not_finite_by_chance": 0.02,  # where a replay may go another way
    "rank_death_between_calls": 0.1,  # with it goes what it has published and nobody has fetched
    "rank_death_in_publish": 0.03,
    "rank_death_in_gather": 0.06,
    "rank_death_in_write": 0.06,
    "rank_death_in_load": 0.08,
    "rank_death_in_start": 0.05,
    "write_failure": 0.05,  # a rank's share does not fit on the disk
    "disk_full": 0.006,  # at one of the driver's writes
    "crash_before_write": 0.006,  # the driver is gone, the write not done
    "crash_after_write": 0.006,
    "crash_any_time": 0.002,
    "stop_request": 0.001,  # SIGTERM, as when a job is preempted
    "checkpoint_damage": 0.25,  # of the newest checkpoint, seen at a crash or a rank's death
}
"""Kind of fault -> its chance at each occasion, at intensity 1."""

DATA_FAULTS = ("group_malformed", "loss_not_finite")
"""Faults that are in the data: the undisturbed run has them as well."""

MAX_CRASHES = 8
"""Deaths of the driver in one schedule: enough to be a nuisance, few enough for an end."""

_MAX_EVENTS = 100_000


class Crash(BaseException):
    """The driver's process is gone; whatever it still tries does nothing."""


class EndlessError(RuntimeError):
    """A schedule did not come to an end: somebody waits for what never comes."""


def digest(*parts: object) -> str:
    """Return a short hash of the parts."""
    return hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).hexdigest()


def share(*parts: object) -> float:
    """Return a number in [0, 1) that hangs on nothing but the parts."""
    return int(digest(*parts), 16) / 2.0**64


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What is learnt from, and how long: the same in every schedule with the same data seed."""

    seed: int
    num_steps: int
    groups_per_step: int
    num_prompts: int
    malformed: float
    """Share of groups that always fail through their own fault."""
    not_finite: float
    """Share of groups whose loss is not finite."""
    num_held_out: int
    max_waves: int | None
    """Waves of dynamic sampling in one step; None = each judged group has a place."""
    alike: float
    """Share of groups whose samples are all judged alike."""
    max_staleness: int
    """Versions between sampling and learning; above 0 what is learnt hangs on who is faster, so two runs differ."""

    @classmethod
    def draw(cls, seed: int) -> "Data":
        """Return the data of a seed; one in three is faultless."""
        chance = random.Random(digest("data", seed))
        is_faulty = chance.random() < 0.67
        return cls(
            seed=seed,
            num_steps=chance.randint(5, 7),
            groups_per_step=chance.randint(3, 5),
            num_prompts=chance.randint(7, 40),
            malformed=chance.choice([0.0, 0.03, 0.08]) if is_faulty else 0.0,
            not_finite=chance.choice([0.0, 0.02, 0.05]) if is_faulty else 0.0,
            num_held_out=chance.choice([0, 0, 2]),
            max_waves=chance.choice([None, None, None, None, 2, 3]),
            alike=chance.choice([0.2, 0.5, 0.8]),
            max_staleness=chance.choice([0, 0, 0, 1, 2]),
        )

    def is_malformed(self, group_id: str) -> bool:
        """Return whether a group always fails."""
        return share("malformed", self.seed, group_id) < self.malformed

    def is_alike(self, content: str) -> bool:
        """Return whether the samples of a group with such answers are judged alike."""
        return share("alike", self.seed, content) < self.alike

    def is_not_finite(self, group_id: str) -> bool:
        """Return whether a group's loss is not a number."""
        return share("not finite", self.seed, group_id) < self.not_finite


class World:
    """Time, chance and notes of one schedule; it outlives every driver process in it.

    Args:
        seed: of the schedule; None = the undisturbed world, in which nothing goes wrong.
        data: what is trained on.
        say: where a replay prints what happens.
    """

    def __init__(self, seed: int | None, data: Data, say: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self.data = data
        self.now = 0.0
        self.injected: Counter[str] = Counter()
        self.random = random.Random(digest("schedule", seed))
        self.is_exact = seed is None or self.random.random() < 0.5
        """Whether a replay gives the same bits, as on CPU; elsewhere each gang's updates differ a little."""
        self.is_down = False
        """Whether the driver's process is gone: nothing it does has an effect any more."""
        self.num_crashes = 0
        self.num_events = 0
        self.trace = 0
        """A hash of when things happened: the same in every replay."""
        self.num_past_wakeups = 0
        """Turns after which the pipeline wanted to be woken in the past, which costs a core of its thread."""
        self._say = say
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._num_scheduled = 0
        self._turn: Callable[[], None] = lambda: None
        self._wakeup: Callable[[], float | None] = lambda: None
        self._stop: Callable[[], None] = lambda: None
        self._chances = self._draw_chances()

    def strikes(self, kind: str) -> bool:
        """Return whether a fault happens at this occasion, and count it."""
        chance = self._chances.get(kind, 0.0)
        if not chance or self.is_down or self.random.random() >= chance:
            return False
        self.injected[kind] += 1
        self.tell(f"FAULT {kind}")
        return True

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Have something happen after some virtual time."""
        self._num_scheduled += 1
        heapq.heappush(self._events, (self.now + seconds, self._num_scheduled, action))

    def drive(self, turn: Callable[[], None], wakeup: Callable[[], float | None]) -> None:
        """Have the pipeline's thread take its turn after each event, and when it wants to be woken."""
        self._turn, self._wakeup = turn, wakeup

    def next_event(self, limit: float = math.inf) -> None:
        """Let the next thing happen, or `limit` come.

        Raises:
            Crash: when the driver dies.
            EndlessError: when nothing will ever happen, or too much has.
        """
        self.crash_if("crash_any_time")
        if self.num_crashes < MAX_CRASHES and self.strikes("stop_request"):
            self.num_crashes += 1
            self._stop()
        self.num_events += 1
        wakeup = self._wakeup()
        if wakeup is not None:
            self.num_past_wakeups += wakeup < self.now
            limit = min(limit, wakeup) if wakeup > self.now else limit
        if self._events and self._events[0][0] <= limit:
            self.now, _, action = heapq.heappop(self._events)
            action()
        elif limit == math.inf:
            raise EndlessError(f"somebody waits at {self.now:.0f} s for what never comes")
        else:
            self.now = limit
        if self.num_events > _MAX_EVENTS:
            raise EndlessError(f"the schedule must end within {_MAX_EVENTS} events, and is at {self.now:.0f} s")
        self.trace = hash((self.trace, self.now))  # of numbers, so no process's own salt is in it
        self._turn()

    def pass_time(self, seconds: float) -> None:
        """Let virtual time pass, and with it whatever happens meanwhile."""
        until = self.now + seconds
        while self.now < until:
            self.next_event(until)

    def crash_if(self, kind: str) -> None:
        """Reach a point at which the driver may die.

        Raises:
            Crash: when it does, and ever after.
        """
        if self.is_down:
            raise Crash
        if self.num_crashes < MAX_CRASHES and self.strikes(kind):
            self.is_down = True
            self.num_crashes += 1
            raise Crash

    def restart(self) -> None:
        """Have a new driver process: of the old one's plans and workers nothing is left."""
        self.is_down = False
        self._events.clear()
        self.drive(lambda: None, lambda: None)
        self.on_stop_request(lambda: None)
        self.now += 10.0

    def soothe(self) -> None:
        """Have fewer faults from now on: somebody has mended something."""
        self._chances = {kind: chance / 2 for kind, chance in self._chances.items()}

    def calm(self) -> None:
        """Have no more faults."""
        self.is_down = False
        self._chances = {}

    def on_stop_request(self, stop: Callable[[], None]) -> None:
        """Call `stop` when somebody asks the driver to stop."""
        self._stop = stop

    def tell(self, text: str) -> None:
        """Print a line of a replay."""
        if self._say is not None:
            self._say(f"{self.now:9.2f}  {text}")

    def _draw_chances(self) -> dict[str, float]:
        """Each schedule has some kinds of faults, from none at all to heavy."""
        if self.seed is None:
            return {}
        intensity = self.random.choice([0.0, 0.3, 1.0, 1.0, 2.5])
        share_of_kinds = self.random.choice([0.15, 0.4, 1.0])
        return {
            kind: min(0.5, chance * intensity / share_of_kinds**0.5)
            for kind, chance in CHANCES.items()
            if self.random.random() < share_of_kinds
        }
