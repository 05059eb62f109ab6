"""One driver of a simulated world: the real `Run`, given the world's prompts, workers, ranks, clock and disk."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import pyarrow as pa

import cluster.run
import cluster.watch
from actors.prompts import DrawnPrompt
from cluster.config import RunConfig
from cluster.interrupt import StopRequest
from cluster.ledger import Transition
from cluster.ledger_store import LedgerStore
from cluster.pipeline import Pipeline
from cluster.pipeline_core import PipelineCore
from cluster.run import Run
from cluster.storage import RunStorage
from tests.simulated_disk import SimulatedDisk
from tests.simulated_learner import SimulatedController, SimulatedGang
from tests.simulated_tables import prompt_row
from tests.simulated_truth import Truth
from tests.simulated_workers import SimulatedWorkers
from tests.simulated_world import Data, World, digest


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

    @property
    def place(self) -> dict[str, int]:
        """Where the next prompt is."""
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
    """The ledger's history: another place where the driver may die; the truth hears of each group."""

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
    """A run whose prompts are the world's; so is what it starts, inside `standing_in`."""

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


class _SimulatedGrowth:
    """Nodes with room that come, and come back, when the world wants."""

    def __init__(self, world: World, grow: Callable[[list[str], int], None]) -> None:
        self._world = world
        self._grow = grow
        self._random = random.Random(digest("growth", world.seed))
        self._is_open = True
        self._wait()

    def close(self) -> None:
        """Look no more."""
        self._is_open = False

    def _wait(self) -> None:
        if self._world.seed is not None:  # in the undisturbed world there is no room
            self._world.later(self._random.uniform(1.0, 60.0), self._look)

    def _look(self) -> None:
        if self._is_open:
            count = self._random.randint(1, 2)
            self._world.injected["node_joined"] += 1
            self._world.tell(f"room for {count} more rollout workers")
            self._grow(["a node"], count)
            self._wait()


@contextmanager
def standing_in(place: Place) -> Iterator[None]:
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

    def workers(specs: Any, **options: Any) -> SimulatedWorkers:
        started = SimulatedWorkers(world, truth, timeout_s=timeout_s)
        if place.config.placement.colocated:
            truth.on_learning = started.check_asleep
        return started

    stand_ins = {
        "ray": Nobody(),
        "open_storage": partial(RunStorage, disk=place.disk),
        "join_cluster": lambda config: (2.0, 2.0),
        "plan_placement": Nobody,
        "Places": Nobody,
        "Growth": lambda processes, look, grow: _SimulatedGrowth(world, grow),
        "prepare_policy": lambda config, **options: "model",
        "RayWorkers": workers,
        "PipelineCore": partial(PipelineCore, clock=lambda: world.now),
        "Pipeline": lambda core: SimulatedPipeline(core, world),
        "LearnerStarter": Starter,
        "StepController": lambda *arguments, **options: SimulatedController(),
    }
    with (
        patch.multiple("cluster.session", **stand_ins),
        patch.multiple(cluster.run, TensorBoard=Nobody, RayGauges=Nobody),
        patch.object(cluster.watch, "write_processes", Nobody()),
        patch.object(cluster.run, "LedgerStore", partial(_Journal, place)),
        patch.object(cluster.run, "claim", Nobody),
        patch.object(cluster.run, "StopRequest", partial(StopRequest, say=world.tell)),
    ):
        yield
