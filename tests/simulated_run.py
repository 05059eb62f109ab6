"""A training run in a simulated world: the real verbs, pipeline, recovery and storage; workers, ranks and time are not.

`live` is one schedule: driver after driver on one disk, until the run is complete or cannot go on.
"""

import random
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import pyarrow as pa

import cluster.metrics
import cluster.run
from actors.prompts import DrawnPrompt
from actors.schema import group_id
from cluster.config import RunConfig, validate
from cluster.dispatcher import DataError, RetriesError
from cluster.fleet import FleetError
from cluster.interrupt import StopRequest
from cluster.ledger import Transition
from cluster.ledger_store import LedgerStore
from cluster.loop import train
from cluster.pipeline import Pipeline
from cluster.pipeline_core import PipelineCore, WeightsLostError
from cluster.ranks import GangError
from cluster.placement import PlacementError
from cluster.recovery import NonFiniteRunError, ReplayError
from cluster.redo import RedoError
from cluster.run import Run
from cluster.storage import RunStorage, StorageError
from tests.simulated_disk import SimulatedDisk
from tests.simulated_learner import SimulatedController, SimulatedGang
from tests.simulated_tables import NUM_SAMPLES, prompt_row
from tests.simulated_truth import Truth
from tests.simulated_workers import SimulatedWorkers
from tests.simulated_world import Crash, Data, World, digest

TYPED = (FleetError, PlacementError, RetriesError, DataError, WeightsLostError, GangError, RedoError, ReplayError, StorageError, OSError)
"""Ends of a run that name cause and remedy; a person starts it again."""
MAX_STARTS = 40
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What one schedule's drivers share."""

    world: World
    truth: Truth
    disk: SimulatedDisk
    config: RunConfig


class SimulatedPrompts:
    """A data set in a seeded order, epoch after epoch; every row is good."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self._drawn = 0
        self.quarantined: list[Any] = []
        self.num_quarantined = 0

    @property
    def position(self) -> dict[str, Any]:
        """Where the next draw continues."""
        return {"drawn": self._drawn}

    def seek(self, position: Mapping[str, Any]) -> None:
        """Continue elsewhere."""
        self._drawn = position["drawn"]

    def draw(self, count: int) -> list[DrawnPrompt]:
        """Return the next prompts."""
        drawn = self.order(self._drawn, self._drawn + count)
        self._drawn += count
        return drawn

    def order(self, start: int, stop: int) -> list[DrawnPrompt]:
        """Return the prompts from one place in the order to another."""
        prompts = []
        for place in range(start, stop):
            epoch, row = divmod(place, self._data.num_prompts)
            names = [f"p{index}" for index in range(self._data.num_prompts)]
            random.Random(digest("order", self._data.seed, epoch)).shuffle(names)
            prompts.append(DrawnPrompt(epoch=epoch, prompt_id=names[row], table=prompt_row(names[row])))
        return prompts

    def held_out(self) -> list[DrawnPrompt]:
        """Return the held-out prompts."""
        names = [f"held-out-{index}" for index in range(self._data.num_held_out)]
        return [DrawnPrompt(epoch=0, prompt_id=name, table=prompt_row(name)) for name in names]


class SimulatedPipeline(Pipeline):
    """The pipeline's front, which lets the world go on where the real one waits for its thread."""

    def __init__(self, core: PipelineCore, world: World) -> None:
        self._core = core
        self._world = world
        self._failure: BaseException | None = None
        world.drive(self._turn, core.next_wakeup)

    def close(self) -> None:
        """End the workers."""
        self._core.close()

    def _turn(self) -> None:
        if self._failure is None:
            try:
                self._core.advance(0.0)
            except Exception as error:  # as in the real thread: whoever waits for the pipeline gets it
                self._failure = error
        if self._failure is not None:
            self._core.fail(self._failure)

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        future = self._core.ask(function, *arguments)
        self._turn()
        value = self._wait(future)
        if hasattr(value, "result"):
            self._wait(value)
        return value

    def _wait(self, future: Any) -> Any:
        while not future.done():
            self._world.next_event()
        return future.result()


class _Journal(LedgerStore):
    """The ledger's history, whose writing is another point at which the driver may die; the truth hears of each group."""

    def __init__(self, place: Place, path: str, say: Callable[[str], None]) -> None:
        super().__init__(path, say=say)
        self._place = place

    def append(self, transitions: Sequence[Transition], now: float) -> None:
        self._place.world.crash_if("crash_before_write")
        super().append(transitions, now)
        self._place.truth.last_transition |= {transition.group_id: transition for transition in transitions}
        self._place.world.crash_if("crash_after_write")


class _Display:
    """Says what a driver says as part of a replay."""

    def __init__(self, world: World) -> None:
        self.say = world.tell

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield

    @contextmanager
    def training(self, done: int, total: int) -> Iterator[None]:
        yield

    def groups(self, what: str, done: int, total: int) -> None:
        pass

    def step(self, row: Mapping[str, Any], num_steps: int) -> None:
        self.say(f"driver is at the end of step {row['step']}")

    def stop(self) -> None:
        pass


class SimulatedRun(Run):
    """A run whose prompts and journal are the world's; what it starts is, too, while it is in `_at`."""

    def __init__(self, place: Place) -> None:
        self.place = place
        display: Any = _Display(place.world)
        super().__init__(place.config, display=display)

    def tables(self, batch: Any) -> pa.Table:
        """Return a batch's rows."""
        return pa.concat_tables(batch.tables)

    def _read_prompts(self) -> Any:
        prompts: Any = SimulatedPrompts(self.place.truth.data)
        self._sources, self.held_out = [prompts], prompts.held_out()
        return prompts


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
    num_typed: int = 0
    counts: dict[str, int] | None = None
    """The ledger's at the end."""
    position: int = 0
    """How many prompts were drawn."""
    rows: list[dict[str, Any]] | None = None
    """The metrics."""


def live(
    seed: int | None,
    data: Data,
    *,
    say: Callable[[str], None] | None = None,
    examine: Callable[[Life], Any],
) -> Any:
    """Run one schedule to its end, and return what `examine` says of it while its disk is there."""
    world = World(seed, data, say)
    with tempfile.TemporaryDirectory(prefix="concord-simulated-", dir=_memory()) as directory, ExitStack() as stack:
        disk = SimulatedDisk(world, directory)
        place = Place(world=world, truth=Truth(data), disk=disk, config=_config(world, directory))
        stack.enter_context(_at(place))
        life = Life(place=place)
        for _ in range(MAX_STARTS):
            _start(life)
            if life.is_complete or life.ended_by or life.untyped:
                break
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
            life.position = run._sources[0].position["drawn"]
            life.rows = run.recorder.rows
        life.is_complete = True
    except Crash:
        world.tell("driver is gone")
    except KeyboardInterrupt:
        world.tell("driver stopped when asked to")
    except NonFiniteRunError as error:
        life.ended_by = f"{type(error).__name__}: {error}"
    except TYPED as error:
        world.tell(f"driver gives up: {type(error).__name__}: {error}")
        life.num_typed += 1
        world.soothe()
    except Exception as error:  # the verdict names it
        world.tell(f"driver fails: {type(error).__name__}: {error}")
        life.untyped = f"{type(error).__name__}: {error}"
    world.tell(f"end of a driver's life at {world.num_events} events")


def _config(world: World, directory: str) -> RunConfig:
    data, choice = world.data, random.Random(digest("config", world.seed))
    evaluation = {"prompts": {"path": "held_out.jsonl"}, "every": 2, "num_prompts": max(1, data.num_held_out)}
    raw = {
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
        "reward": {"components": {"share": {"function": "tests.rules:share_of_a"}}, "num_workers": choice.randint(1, 2)},
        "evaluation": evaluation if data.num_held_out else {},
        "pipeline": {"timeout_s": _TIMEOUT_S, "heartbeat_s": choice.choice([5.0, 40.0])},
        "placement": {"ready_timeout_s": 20.0},
    }
    return validate(RunConfig, raw, where="simulation")


@contextmanager
def _at(place: Place) -> Iterator[None]:
    """Have a session start the world's processes in place of Ray's, and leave out TensorBoard, gauges and the lock."""
    world, truth, timeout_s = place.world, place.truth, place.config.pipeline.timeout_s

    class Nobody:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            return Nobody()

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return None

    class Starter(Nobody):
        def __call__(self) -> SimulatedGang:
            return SimulatedGang(world, truth, place.disk, timeout_s=timeout_s)

    stand_ins = {
        "ray": Nobody(),
        "RunStorage": partial(RunStorage, disk=place.disk),
        "join_cluster": lambda config: (2.0, 2.0),
        "plan_placement": Nobody,
        "prepare_policy": lambda config, **options: "model",
        "RayWorkers": lambda specs, **options: SimulatedWorkers(world, truth, timeout_s=timeout_s),
        "PipelineCore": partial(PipelineCore, clock=lambda: world.now),
        "Pipeline": lambda core: SimulatedPipeline(core, world),
        "LearnerStarter": Starter,
        "StepController": lambda *arguments, **options: SimulatedController(),
    }
    with (
        patch.multiple("cluster.session", **stand_ins),
        patch("torch.utils.tensorboard.SummaryWriter", Nobody),
        patch.object(cluster.metrics.Recorder, "_gauge", lambda self, name: Nobody()),
        patch.object(cluster.run, "LedgerStore", partial(_Journal, place)),
        patch.object(cluster.run, "claim", Nobody),
        patch.object(cluster.run, "StopRequest", partial(StopRequest, say=world.tell)),
    ):
        yield


def _memory() -> str | None:
    import os

    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def accepted_order(data: Data, count: int) -> list[str]:
    """Return the first groups in the data's order."""
    return [group_id(prompt.epoch, prompt.prompt_id) for prompt in SimulatedPrompts(data).order(0, count)]
