"""One simulated run of `benchmarks/scale.py`: the real pipeline, ledger and controller under a simulated clock."""

import gc
import json
import math
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.scale_workload import (
    LEARN_S,
    PROMPTS_PER_WORKER,
    SAMPLES_PER_PROMPT,
    config_for,
    open_prompts,
    some_samples,
)
from benchmarks.scale_world import Charges, Journal, Meter, ScaleWorkers, World
from cluster.config import RunConfig
from cluster.groups import Batch
from cluster.ledger import Ledger
from cluster.messages import Weights
from cluster.pipeline_core import PipelineCore
from learner.controller import StepController

_WARM_UP_STEPS = 2
_NUM_TEMPLATES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one run gave, after its first steps."""

    num_workers: int
    num_steps: int
    num_samples: int
    seconds: float
    """Simulated."""
    measured_s: float
    """Driver CPU that was really measured here."""
    turns_s: float
    """Of it, the pipeline's turns; the rest is the loop's."""
    busy_s: float
    """Of the driver's core: with what is charged for Ray."""
    redo_s: float
    """CPU of another core, on the redo log."""
    num_turns: int

    @property
    def busy_share(self) -> float:
        """Share of the time in which the driver's core was busy."""
        return self.busy_s / self.seconds

    @property
    def samples_per_s(self) -> float:
        """Samples in batches, a second."""
        return self.num_samples / self.seconds

    @property
    def driver_ms_per_sample(self) -> float:
        """CPU of the driver's process for one sample, milliseconds."""
        return 1e3 * (self.busy_s + self.redo_s) / self.num_samples


class SimulatedRun:
    """A driver at work.  `advance` takes the pipeline's turns; the loop is a generator that waits for them."""

    def __init__(self, config: RunConfig, directory: Path, charges: Charges) -> None:
        self.world = World()
        self._config = config
        self._charges = charges
        self.meter = Meter()
        self.measured_s = 0.0
        self.turns_s = 0.0
        self.workers = ScaleWorkers(self.world, some_samples(_NUM_TEMPLATES))
        self._core = PipelineCore(
            config,
            prompts=open_prompts(config, directory),
            workers=self.workers,
            ledger=Ledger(),
            journal=Journal(str(directory / "ledger.sqlite"), self.meter),
            clock=lambda: self.world.now,
        )
        self._controller = StepController(
            config.reward,
            config.learner,
            config.algorithm,
            num_steps=config.run.num_steps,
            seed=0,
            max_new_tokens=config.rollouts.max_new_tokens,
        )
        self.marks: list[tuple[float, float, float, float, int]] = []
        """After each step: the time, the driver's core, what was measured of it, and in turns, how many turns."""

    def run(self, num_steps: int) -> None:
        """Do so many steps."""
        loop = self._loop(num_steps)
        waiting = next(loop, None)
        while waiting is not None:
            self.world.turn(self._advance, self._core.next_wakeup())
            self.workers.depart()
            while waiting is not None and waiting():
                waiting = next(loop, None)

    def _advance(self) -> float:
        before = self.workers.num_calls
        spent = self.meter.measure(lambda: self._core.advance(0.0))
        self.measured_s += spent
        self.turns_s += spent
        return spent + self._charges.call_s * (self.workers.num_calls - before)

    def _loop(self, num_steps: int) -> Iterator[Callable[[], bool]]:
        """Do what the loop's thread does; yield what it waits for."""
        yield from self._asked(self._core.ready)
        for step in range(1, num_steps + 1):
            yield from self._asked(self._core.publish, Weights(incarnation=0, version=step - 1), "publication")
            batch: Batch = yield from self._asked(self._core.batch, step)
            groups = len(batch.group_ids)
            self.world.charge(groups * self._charges.fetch_s)
            yield self._after(groups * self._charges.redo_wall_s)
            self._work(partial(self._plan, batch))
            yield self._after(LEARN_S)
            yield from self._asked(self._core.settle, batch, None)
            state = yield from self._asked(self._core.state_dict)
            yield from self._asked(self._core.usage)
            self._work(partial(json.dumps, state))
            self.world.charge(self._charges.step_s)
            world = self.world
            self.marks.append((world.now, world.busy_s, self.measured_s, self.turns_s, world.num_turns))

    def _plan(self, batch: Batch) -> None:
        """Do what the driver does of learning."""
        json.dumps(batch.after)
        plan = self._controller.plan(batch.step, batch.samples)
        self._controller.metrics(plan, batch.samples)
        self._controller.observe(plan, batch.samples, {})

    def _work(self, action: Callable[[], Any]) -> None:
        spent = self.meter.measure(action)
        self.measured_s += spent
        self.world.charge(spent)

    def _asked(self, function: Callable[..., Any], *arguments: Any) -> Generator[Callable[[], bool], None, Any]:
        """Ask the pipeline; yield until it has answered, and return the answer."""
        future: Future[Any] = self._core.ask(function, *arguments)
        self.world.at(self.world.now, lambda: None)
        yield future.done
        answer = future.result()
        while isinstance(answer, Future):
            yield answer.done
            answer = answer.result()
        return answer

    def _after(self, seconds: float) -> Callable[[], bool]:
        when = max(self.world.now, self.world.free_at) + seconds
        self.world.at(when, lambda: None)
        return lambda: self.world.now >= when


def simulate(num_workers: int, directory: Path, *, staleness: int, charges: Charges, num_groups: int) -> Figures:
    """Run about so many groups after the first steps, and return the figures.

    Args:
        num_workers: rollout workers.
        directory: has the prompts; the ledger's file is made there.
        staleness: `pipeline.max_staleness`.
        charges: what is not measured here.
        num_groups: measured, at least three steps.
    """
    prompts_per_step = PROMPTS_PER_WORKER * num_workers
    num_steps = max(3, math.ceil(num_groups / prompts_per_step))
    place = directory / f"workers-{num_workers}"
    place.mkdir()
    config = config_for(num_workers, directory, staleness=staleness, prompts_per_step=prompts_per_step)
    run = SimulatedRun(config, place, charges)
    try:
        run.run(_WARM_UP_STEPS + num_steps)
    finally:
        gc.enable()
    first, last = run.marks[_WARM_UP_STEPS - 1], run.marks[-1]
    return Figures(
        num_workers=num_workers,
        num_steps=num_steps,
        num_samples=num_steps * prompts_per_step * SAMPLES_PER_PROMPT,
        seconds=last[0] - first[0],
        busy_s=last[1] - first[1],
        redo_s=num_steps * prompts_per_step * charges.redo_cpu_s,
        measured_s=last[2] - first[2],
        turns_s=last[3] - first[3],
        num_turns=last[4] - first[4],
    )
