"""What the bookkeeping costs: ledger, redo log and watchdogs, as CPU time, against everything a step costs.

Runs the first steps of a training run with its real processes and attributes the driver's CPU time by wrapping the
functions that do the bookkeeping; the whole step's CPU time is that of the driver and all its child processes (Ray's
own included, since the driver starts them).  CPU time, so neighbours on the machine disturb little.  Nothing goes wrong
in the run, so this is what safety costs on an ordinary day.  Prints one line of JSON last.

    python -m benchmarks.overhead CONFIG.yaml [section.field=value ...]
"""

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import psutil

from cluster.config import RunConfig, load
from cluster.dispatcher import Dispatcher
from cluster.ledger import Ledger
from cluster.ledger_store import LedgerStore
from cluster.pipeline_core import PipelineCore
from cluster.redo import RedoLog

NUM_STEPS = 3

PARTS = {
    "ledger": [
        (Ledger, "accept lease generated scored batch train counts take_transitions snapshot"),
        (LedgerStore, "append"),
    ],
    "redo_log": [(RedoLog, "write has")],
    "watchdogs": [(Dispatcher, "tick next_wakeup")],
}

PIPELINE = "pipeline_thread"
"""Everything in the pipeline's thread, calls to Ray included: more than the bookkeeping, and here to compare."""


class Meter:
    """CPU seconds of the calling threads inside the wrapped functions, by part; nested calls count once."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._depth: defaultdict[str, int] = defaultdict(int)

    def wrap(self, owner: type, name: str, part: str) -> None:
        """Replace a method by one that is timed."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            self._depth[part] += 1
            try:
                return inner(*args, **kwargs)
            finally:
                self._depth[part] -= 1
                if self._depth[part] == 0:
                    self.seconds[part] += time.thread_time() - started

        setattr(owner, name, timed)


def main() -> None:
    """Run the steps and print the shares."""
    meter = Meter()
    for part, owners in PARTS.items():
        for owner, names in owners:
            for name in names.split():
                meter.wrap(owner, name, part)
    meter.wrap(PipelineCore, "advance", PIPELINE)
    from cluster.loop import train_step
    from cluster.run import Run

    path, *overrides = sys.argv[1:]
    with tempfile.TemporaryDirectory() as directory:
        last = max(NUM_STEPS, 1)
        settings = [*overrides, f"run.dir={directory}/run", f"run.num_steps={last + 1}", f"run.checkpoint_every={last}"]
        config = load(RunConfig, path, settings)
        with Run(config) as run:
            steps = run.steps()
            before, marked = _cpu_s(), dict(meter.seconds)
            for _ in range(last):
                train_step(run, next(steps))
            total = _cpu_s() - before
    parts = {name: meter.seconds[name] - marked.get(name, 0.0) for name in PARTS}
    samples = last * config.rollouts.prompts_per_step * config.rollouts.samples_per_prompt
    summary = {
        "steps": last,
        "samples": samples,
        "cpu_s_per_step": round(total / last, 3),
        **{f"{name}_ms_per_step": round(1e3 * seconds / last, 3) for name, seconds in parts.items()},
        "share": round(sum(parts.values()) / total, 6),
        "driver_ms_per_sample": round(1e3 * sum(parts.values()) / samples, 4),
        f"{PIPELINE}_ms_per_sample": round(1e3 * (meter.seconds[PIPELINE] - marked.get(PIPELINE, 0.0)) / samples, 4),
    }
    print(json.dumps(summary))


def _cpu_s() -> float:
    """CPU seconds of this process and all its descendants, those that have ended included."""
    driver = psutil.Process()
    own = driver.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in driver.children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


if __name__ == "__main__":
    main()
