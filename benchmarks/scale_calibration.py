"""What real Ray calls cost the driver: 16 rollout processes that sleep, under the real pipeline, pool and ledger.

The driver's CPU time is measured as a whole, Ray's own threads included, and the pipeline's thread apart.  What the
simulation's driver spends on the same number of groups without Ray is subtracted, and the rest is what every group is
charged there beyond what the simulation measures.
"""

import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray import cloudpickle

from actors.weights import Publication
from benchmarks import scale_stubs
from benchmarks.scale_stubs import StubRewardWorker, StubRolloutWorker
from benchmarks.scale_workload import (
    SAMPLES_PER_PROMPT,
    Sizes,
    config_for,
    open_prompts,
    rollouts_of,
    scored_group,
    write_prompts,
)
from cluster.config import RunConfig
from cluster.groups import Batch
from cluster.ledger import Ledger
from cluster.ledger_store import LedgerStore
from cluster.messages import Role
from cluster.metrics import Recorder
from cluster.pipeline import Pipeline
from cluster.pipeline_core import PipelineCore
from cluster.placement import Processes
from cluster.pool import RayWorkers, fetch, unique_name
from cluster.redo import RedoLog
from cluster.storage import RunStorage
from cluster.trackers import TensorBoard, Trackers
from reward.samples import samples_of

NUM_WORKERS, NUM_JUDGES = 16, 2
_WARM_UP_STEPS = 1
_GENERATE_S, _JUDGE_S = 0.4, 0.005
_PROMPTS_PER_STEP = 512
_NUM_METRICS = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """CPU of a real driver, seconds a group, and what it received."""

    driver_s: float
    """All threads of the process, from prompt to settled batch."""
    pipeline_thread_s: float
    """Of it, the thread that owns the pipeline."""
    fetch_s: float
    """The loop's thread, bringing a group's rows from the object store."""
    groups_per_s: float
    sizes: Sizes
    is_inlined: bool
    """Whether the rows come through the driver's process after all: a table below Ray's limit travels in the reply."""


def calibrate(*, num_steps: int) -> Costs:
    """Run the steps with real processes and return the cost of a group."""
    cloudpickle.register_pickle_by_value(scale_stubs)
    scored = scored_group("0/calibration")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_prompts(directory)
        config = config_for(NUM_WORKERS, directory, staleness=1, prompts_per_step=_PROMPTS_PER_STEP)
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            return _measure(config, directory, scored, num_steps)
        finally:
            ray.shutdown()
            cloudpickle.unregister_pickle_by_value(scale_stubs)


def _measure(config: RunConfig, directory: Path, scored: pa.Table, num_steps: int) -> Costs:
    specs = _specs(scored)
    journal = LedgerStore(str(directory / "ledger.sqlite"))
    prompts = open_prompts(config, directory)
    core = PipelineCore(
        config, prompts=prompts, workers=RayWorkers(specs, run=unique_name("scale")), ledger=Ledger(), journal=journal
    )
    pipeline = Pipeline(core)
    try:
        pipeline.wait_ready()
        for step in range(1, _WARM_UP_STEPS + 1):
            _step(pipeline, step)
        thread = time.pthread_getcpuclockid(pipeline._thread.ident or 0)
        wall, before, before_thread = time.perf_counter(), time.process_time(), time.clock_gettime(thread)
        fetch_s = 0.0
        for step in range(_WARM_UP_STEPS + 1, _WARM_UP_STEPS + num_steps + 1):
            fetch_s += _step(pipeline, step)
        groups = num_steps * config.rollouts.prompts_per_step
        return Costs(
            driver_s=(time.process_time() - before) / groups,
            pipeline_thread_s=(time.clock_gettime(thread) - before_thread) / groups,
            fetch_s=fetch_s / groups,
            groups_per_s=groups / (time.perf_counter() - wall),
            sizes=sizes_of(scored),
            is_inlined=_is_inlined(pipeline, _WARM_UP_STEPS + num_steps + 1),
        )
    finally:
        pipeline.close()


def _step(pipeline: Pipeline, step: int) -> float:
    """Do what the loop does with the pipeline in a step; return the CPU seconds of bringing the rows."""
    pipeline.publish(Publication(version=step - 1, incarnation=0, buckets=()))
    batch = pipeline.take_batch(step)
    started = time.thread_time()
    rows = pa.concat_tables(fetch(list(batch.tables), what="reading a batch", timeout_s=60.0))
    spent = time.thread_time() - started
    assert rows.num_rows == SAMPLES_PER_PROMPT * len(batch.group_ids)
    pipeline.settle(batch)
    return spent


def _is_inlined(pipeline: Pipeline, step: int) -> bool:
    """Whether a batch's rows are in this process's own memory before anybody has asked for them."""
    batch = pipeline.take_batch(step)
    locations = ray.experimental.get_local_object_locations(list(batch.tables))
    return not any(location["node_ids"] for location in locations.values())


def _specs(scored: pa.Table) -> dict[Role, tuple[type, dict[str, Any], Processes]]:
    samples = samples_of(scored)
    rollouts = Processes(role="rollout", count=NUM_WORKERS, cpus=0.1, gpus=0, threads=1)
    judges = Processes(role="reward", count=NUM_JUDGES, cpus=0.1, gpus=0, threads=1)
    judge_arguments = {"scored": scored, "samples": samples, "seconds": _JUDGE_S}
    return {
        Role.ROLLOUT: (StubRolloutWorker, {"rows": rollouts_of(scored), "seconds": _GENERATE_S}, rollouts),
        Role.REWARD: (StubRewardWorker, judge_arguments, judges),
    }


def sizes_of(scored: pa.Table) -> Sizes:
    """Return what a group's messages weigh as Ray serializes them."""
    numbers = {"num_tokens": 2048, "num_bytes": scored.nbytes, "generate_s": 6.5}
    return Sizes(
        scored=_pickled_bytes(scored),
        rollouts=_pickled_bytes(rollouts_of(scored)),
        samples=_pickled_bytes(samples_of(scored)),
        numbers=_pickled_bytes(numbers),
    )


def _pickled_bytes(value: Any) -> int:
    buffers: list[Any] = []
    head = cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return len(head) + sum(buffer.raw().nbytes for buffer in buffers)


def redo_cost(*, num_groups: int) -> tuple[float, float]:
    """Write real rows to a real redo log, three times; return the fastest one's seconds a group: CPU, wall."""
    rows = pa.concat_tables([scored_group(f"0/redo-{number}") for number in range(num_groups)])
    samples = samples_of(rows)
    found = []
    with tempfile.TemporaryDirectory() as directory:
        log = RedoLog(RunStorage(f"{directory}/run"))
        for step in range(1, 4):
            batch = Batch(step=step, group_ids=(), tables=(), samples=samples, after={"quarantined": {}})
            wall, cpu = time.perf_counter(), time.thread_time()
            log.write(batch, rows)
            found.append(((time.thread_time() - cpu) / num_groups, (time.perf_counter() - wall) / num_groups))
    return min(found)


def step_cost() -> float:
    """Return the CPU seconds of a step's metrics: journal, TensorBoard; Ray's gauges are in the calls' costs."""
    values = {f"metric_{number}": float(number) for number in range(_NUM_METRICS)}
    with tempfile.TemporaryDirectory() as directory:
        trackers = Trackers([TensorBoard(f"{directory}/tensorboard", last_step=0)])
        recorder = Recorder(RunStorage(f"{directory}/run"), last_step=0, trackers=trackers)
        recorder.record(1, values)
        started = time.thread_time()
        for step in range(2, 12):
            recorder.record(step, values)
        spent = (time.thread_time() - started) / 10
        recorder.close()
    return spent
