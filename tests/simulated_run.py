"""One schedule of the simulation: driver after driver on one disk, until the run is complete or cannot go on."""

import errno
import os
import random
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.schema import group_id
from cluster.config import RunConfig, validate
from cluster.distribution import WeightsLostError
from cluster.fleet import FleetError
from cluster.limits import DataError, RetriesError
from cluster.loop import train
from cluster.placement import PlacementError
from cluster.ranks import GangError
from cluster.recovery import NonFiniteRunError, ReplayError
from cluster.storage import StorageError
from tests.simulated_disk import SimulatedDisk
from tests.simulated_driver import Place, SimulatedPrompts, SimulatedRun, standing_in
from tests.simulated_tables import NUM_SAMPLES
from tests.simulated_truth import Truth
from tests.simulated_world import Crash, Data, World, digest

TYPED = (
    FleetError, PlacementError, RetriesError, DataError, WeightsLostError, GangError, ReplayError, StorageError
)  # fmt: skip
"""Ends of a run that name cause and remedy; as after a full disk, a person starts it again."""
MAX_STARTS = 40
_TIMEOUT_S = 30.0


@dataclass(slots=True, kw_only=True)
class Life:
    """How a schedule went."""

    place: Place
    is_complete: bool = False
    ended_by: str = ""
    """The typed error that no new start helps against."""
    untyped: str = ""
    """An error that must not happen."""
    num_starts: int = 0
    typed: Counter[str] = field(default_factory=Counter)
    """Typed errors after which somebody started the run again."""
    counts: dict[str, int] = field(default_factory=dict)
    """The ledger's at the end."""
    told: dict[str, int] = field(default_factory=dict)
    """What the ledger's history on disk says of it."""
    position: int = 0
    """How many prompts were drawn."""
    owed: tuple[int, ...] = ()
    """Which of them, by number, were drawn ahead by a driver that is gone, and were not wanted again."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The metrics."""

    @property
    def is_open(self) -> bool:
        """Whether another driver may go on."""
        return not (self.is_complete or self.ended_by or self.untyped)


def live(
    seed: int | None,
    data: Data,
    *,
    say: Callable[[str], None] | None = None,
    examine: Callable[[Life], Any],
) -> Any:
    """Run one schedule to its end, and return what `examine` says of it while its disk is there."""
    world = World(seed, data, say)
    with tempfile.TemporaryDirectory(prefix="concord-simulated-", dir=_memory()) as directory:
        disk = SimulatedDisk(world, directory)
        place = Place(world=world, truth=Truth(data), disk=disk, config=_config(world, directory))
        life = Life(place=place)
        with standing_in(place):
            while life.is_open and life.num_starts < MAX_STARTS:
                _start(life)
                if life.is_open:
                    world.restart()
                    disk.damage()
        world.calm()
        return examine(life)


def _start(life: Life) -> None:
    """Live one driver's life."""
    world = life.place.world
    world.tell("driver starts")
    life.num_starts += 1
    try:
        with SimulatedRun(life.place) as run:
            world.on_stop_request(lambda: run.stop._take(signal.SIGTERM, None))
            train(run)
            life.counts = run.pipeline.counts()
            life.told = run._store.counts()
            position = run.pipeline._core._draws.position(())
            life.position, life.owed = position["next"]["drawn"], tuple(place["drawn"] for place in position["owed"])
            life.rows = run.recorder.rows
        life.is_complete = True
    except Crash:
        world.tell("driver is gone")
    except KeyboardInterrupt:
        world.tell("driver stopped when asked to")
    except NonFiniteRunError as error:
        life.ended_by = f"{type(error).__name__}: {error}"
    except (*TYPED, OSError) as error:
        world.tell(f"driver gives up: {type(error).__name__}: {error}")
        life.typed[type(error).__name__] += 1
        world.soothe()
        if isinstance(error, OSError) and error.errno != errno.ENOSPC:
            life.untyped = f"{type(error).__name__}: {error}"
    except Exception as error:  # the verdict names it
        world.tell(f"driver fails: {type(error).__name__}: {error}")
        life.untyped = f"{type(error).__name__}: {error}"
    world.tell(f"end of a driver's life at {world.num_events} events")


def _config(world: World, directory: str) -> RunConfig:
    data, choice = world.data, random.Random(digest("config", world.seed))
    judge = {"function": "tests.rules:share_of_a"}
    judges = {"share": judge} if data.max_waves is None else {"share": judge, "passed": judge}
    component = "passed" if data.seed % 2 else None
    sampling = {"dynamic_sampling": {"max_waves": data.max_waves, "component": component}}
    evaluation = {"prompts": {"path": "held_out.jsonl"}, "every": 2, "num_prompts": max(1, data.num_held_out)}
    raw: dict[str, Any] = {
        "run": {
            "dir": directory,
            "num_steps": data.num_steps,
            "checkpoint_every": 2,
            "keep_checkpoints": choice.randint(1, 3),
        },
        "policy": {"model": "model"},
        "prompts": {"path": "prompts.jsonl"},
        "rollouts": {
            "prompts_per_step": data.groups_per_step,
            "samples_per_prompt": NUM_SAMPLES,
            "max_rows": 4,
            "num_workers": choice.randint(1, 3),
        },
        "reward": {
            "components": judges,
            "num_workers": choice.randint(1, 2),
        },
        "algorithm": {} if data.max_waves is None else sampling,
        "evaluation": evaluation if data.num_held_out else {},
        "pipeline": {
            "timeout_s": _TIMEOUT_S,
            "heartbeat_s": choice.choice([5.0, 40.0]),
            "max_staleness": data.max_staleness,
        },
        "placement": {"ready_timeout_s": 20.0, "colocated": not data.max_staleness and choice.random() < 0.4},
    }
    if choice.random() < 0.4:
        raw["rollouts"]["max_workers"] = raw["rollouts"]["num_workers"] + choice.randint(1, 2)
    return validate(RunConfig, raw, where="simulation")


def _memory() -> str | None:
    """Return where files cost no disk access."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def accepted_order(data: Data, count: int, *, owed: Sequence[int] = ()) -> list[str]:
    """Return the first groups in the data's order, without those that are owed."""
    order = enumerate(SimulatedPrompts(data).order(0, count))
    return [group_id(prompt.epoch, prompt.prompt_id) for number, prompt in order if number not in owed]
