"""How many rollout workers one driver can keep busy: 1 to 1,024 of them, simulated, under the real driver.

Pipeline, dispatcher, fleets, ledger (SQLite on disk), prompts (encoded by a tokenizer) and the learner's controller
are the code that ships.  Time is simulated: the driver is one core that does one thing after another, each turn of the
pipeline takes the CPU time that it took here, and what Ray's calls cost beyond that is measured by a run with 16 real
actors that sleep, and charged to each call.  Workers take as long as their lognormal response lengths say, all rows of
a worker side by side; the step grows with the fleet (weak scaling), and the learner is faster than generation.  The
parameters are those of a 7B policy, one GPU a worker: `benchmarks/scale_workload.py`.

    python -m benchmarks.scale [--workers 1 4 16 64 256 1024] [--staleness 2] [--output FILE]

Prints the calibration, a table, and last one line of JSON: `efficiency_n` is samples/s with n workers over n times
samples/s with one, `driver_ms_per_sample` all CPU time of the driver with the most workers, redo log included,
`bytes_per_sample` what the driver receives in answers, rows included where Ray puts them there; `row_bytes_per_sample`
what it reads for the redo log.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import finish
from benchmarks.scale_calibration import NUM_WORKERS, Costs, calibrate, redo_cost, step_cost
from benchmarks.scale_run import Figures, simulate
from benchmarks.scale_workload import SAMPLES_PER_PROMPT, parameters, perfect_samples_per_s, write_prompts
from benchmarks.scale_world import Charges

_CALLS_PER_GROUP = 2
_NOTHING = Charges(call_s=0.0, fetch_s=0.0, redo_cpu_s=0.0, redo_wall_s=0.0, step_s=0.0)


def main() -> None:
    """Calibrate, simulate, print."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_prompts(directory)
        costs, charges = _calibration(directory, arguments.calibration_steps, arguments.staleness)
        found = [
            simulate(count, directory, staleness=arguments.staleness, charges=charges, num_groups=arguments.groups)
            for count in sorted({1, *arguments.workers})
        ]
    rows = [_row(figures, found[0]) for figures in found]
    for row in rows:
        print("  ".join(f"{name} {value:g}" for name, value in row.items()), flush=True)
    last, sizes = rows[-1], costs.sizes
    small, rows_in_replies = sizes.samples + sizes.numbers, costs.is_inlined * (sizes.rollouts + sizes.scored)
    report = {
        **{f"efficiency_{row['workers']}": row["efficiency"] for row in rows[1:]},
        "driver_ms_per_sample": last["driver_ms_per_sample"],
        "bytes_per_sample": round((small + rows_in_replies) / SAMPLES_PER_PROMPT),
        "small_bytes_per_sample": round(small / SAMPLES_PER_PROMPT),
        "row_bytes_per_sample": round(sizes.scored / SAMPLES_PER_PROMPT),
        "rows_travel_in_replies": costs.is_inlined,
        "staleness": arguments.staleness,
        "parameters": parameters(),
        "perfect_samples_per_s": round(perfect_samples_per_s(), 3),
        "calibration": {name: value for name, value in asdict(costs).items() if name != "sizes"},
        "charges": asdict(charges),
        "by_workers": rows,
    }
    finish(report, arguments.output)


def _calibration(directory: Path, num_steps: int, staleness: int) -> tuple[Costs, Charges]:
    """Return what a real driver spends on a group, and what the simulation is charged beyond what it measures."""
    costs = calibrate(num_steps=num_steps)
    place = directory / "calibration"
    place.mkdir()
    write_prompts(place)
    core = simulate(NUM_WORKERS, place, staleness=staleness, charges=_NOTHING, num_groups=1500)
    core_s = core.turns_s * SAMPLES_PER_PROMPT / core.num_samples
    beyond_s = max(0.0, costs.driver_s - costs.fetch_s - core_s)
    redo_cpu_s, redo_wall_s = redo_cost(num_groups=256)
    charges = Charges(
        call_s=beyond_s / _CALLS_PER_GROUP,
        fetch_s=costs.fetch_s,
        redo_cpu_s=redo_cpu_s,
        redo_wall_s=redo_wall_s,
        step_s=step_cost(),
    )
    print(
        f"calibration, {NUM_WORKERS} real actors, CPU for a group: driver {1e3 * costs.driver_s:.3f} ms, of it the "
        f"pipeline's thread {1e3 * costs.pipeline_thread_s:.3f} ms and reading rows {1e3 * costs.fetch_s:.3f} ms; the "
        f"driver in simulated time {1e3 * core_s:.3f} ms; so Ray takes {1e3 * charges.call_s:.3f} ms a call; "
        f"redo log {1e3 * redo_cpu_s:.3f} ms",
        flush=True,
    )
    return costs, charges


def _row(figures: Figures, single: Figures) -> dict[str, Any]:
    return {
        "workers": figures.num_workers,
        "samples_per_s": round(figures.samples_per_s, 2),
        "efficiency": round(figures.samples_per_s / (figures.num_workers * single.samples_per_s), 4),
        "of_perfect": round(figures.samples_per_s / (figures.num_workers * perfect_samples_per_s()), 4),
        "driver_ms_per_sample": round(figures.driver_ms_per_sample, 4),
        "measured_ms_per_sample": round(1e3 * figures.measured_s / figures.num_samples, 4),
        "driver_busy": round(figures.busy_share, 4),
        "steps": figures.num_steps,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024], help="fleet sizes")
    parser.add_argument("--staleness", type=int, default=2, help="pipeline.max_staleness")
    parser.add_argument("--groups", type=int, default=6000, help="measured with each size, at least three steps")
    parser.add_argument("--calibration-steps", type=int, default=3, help="measured steps with real actors")
    parser.add_argument("--output", help="file for the result")
    return parser.parse_args()


if __name__ == "__main__":
    main()
