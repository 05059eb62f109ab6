"""Every algorithm on RandomWalks, through the public command line, against the exact frontier of its own reference.

    python -m benchmarks.randomwalks --seed 1000                 the whole table, some 20 minutes on two cores
    python -m benchmarks.randomwalks --seed 1001 --only ppo ilql

One JSON line for each algorithm: `optimality` and `kl` (nats per walk) of the trained policy on held-out random
numbers, means over all starts that can reach the goal; `frontier_optimality`, the best that any policy can reach at
that KL from the run's supervised start; `standard_error` of the distance to it; for offline algorithms `gap_closed`,
the share of the way from the data's mean to 1.  `--write` keeps lines and plot in `benchmarks/results/`, from which
`docs/algorithms.md` is made.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from examples.randomwalks.graph import Task, make_task
from learner.presets import OFFLINE, ONLINE, PRESETS
from tests.randomwalks_exact import Outcomes, frontier_at_beta, frontier_at_kl, language_model, outcomes

RESULTS = Path(__file__).parent / "results"
NUM_STEPS = 40
COMMON = (
    f"run.num_steps={NUM_STEPS}",
    f"run.checkpoint_every={NUM_STEPS}",
    f"evaluation.every={NUM_STEPS}",
    "evaluation.samples_per_prompt=64",
    "rollouts.samples_per_prompt=16",
)
"""Of every online run: 40 steps of 20 prompts with 16 samples."""
_ONE_UPDATE_A_SAMPLE = ("learner.epochs=1",)
OVERRIDES: dict[str, tuple[str, ...]] = {
    "a2c": _ONE_UPDATE_A_SAMPLE,
    "reinforce": _ONE_UPDATE_A_SAMPLE,
    # No clip holds it back, and what collapses on a wrong walk early never sees another one.
    "cispo": _ONE_UPDATE_A_SAMPLE,
    # Walks below the mean are pushed away without bound, so it must stay exactly on-policy: one update a step.
    "reinforce_batch_mean": (
        *_ONE_UPDATE_A_SAMPLE,
        "learner.num_minibatches=1",
        "learner.optimizer.learning_rate=1.0e-3",
    ),
    "reinforce_ema": _ONE_UPDATE_A_SAMPLE,
    "reinforce_value": _ONE_UPDATE_A_SAMPLE,
}
"""Settings beside `algorithm.name`, where an algorithm needs some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One row of the table."""

    algorithm: str
    kind: str
    seed: int
    optimality: float
    kl: float
    frontier_optimality: float
    standard_error: float
    """Of optimality - frontier_optimality, from the spread over walks."""
    gap_closed: float | None
    seconds: float


def main() -> None:
    """Run the table, print it line by line, draw it."""
    arguments = _arguments()
    task = make_task(arguments.seed)
    directory = Path(arguments.output) / str(arguments.seed)
    directory.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    reference = _supervised_start(arguments.seed, directory)
    exact = outcomes(task, language_model(reference))
    names = arguments.only or list(PRESETS)
    target = (RESULTS if arguments.write else directory) / f"randomwalks-{arguments.seed}.jsonl"
    lines: list[Line] = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            for line in pool.map(lambda name: _measure(name, task, exact, directory), names):
                print(json.dumps(asdict(line)), flush=True)
                lines.append(line)
        finally:  # what is measured is kept when a later algorithm fails
            lines = _merged(lines, target) if arguments.only else lines
            target.write_text("".join(json.dumps(asdict(line)) + "\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} algorithms in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    draw(lines, exact, str(target.with_suffix(".png")))


def _merged(lines: list[Line], path: Path) -> list[Line]:
    """Return lines in the place of those of the same algorithms in an earlier table."""
    kept = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    earlier = {line.algorithm: line for line in (Line(**json.loads(text)) for text in kept)}
    found = earlier | {line.algorithm: line for line in lines}
    return [found[name] for name in PRESETS if name in found]


def draw(lines: list[Line], exact: Outcomes, path: str) -> None:
    """Draw all points under the exact frontier of their reference as PNG: the whole curve, and where it is crowded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    whole, near = figure.subplots(1, 2)
    furthest = max([line.kl for line in lines], default=1.0) + 0.1
    curve = [frontier_at_beta(exact, beta) for beta in np.geomspace(3.0, 1e-3, 200)]
    online = [line for line in lines if line.kind == "online"]
    for axes, shown in ((whole, [line for line in lines if line.kind == "offline"]), (near, online)):
        kls, values = [point.kl for point in curve], [point.value for point in curve]
        axes.plot([*kls, furthest], [*values, values[-1]], color="black", label="exact frontier")
        for kind, marker in (("online", "o"), ("offline", "s")):
            chosen = [line for line in lines if line.kind == kind]
            axes.scatter([line.kl for line in chosen], [line.optimality for line in chosen], marker=marker, label=kind)
        axes.set_xlabel("KL from the supervised start, nats per walk")
        _name(axes, shown)
    if online:
        near.set_xlim(min(line.kl for line in online) - 0.1, furthest)
        near.set_ylim(min(line.optimality for line in online) - 0.01, 1.003)
    whole.set_ylabel("optimality")
    whole.legend(loc="lower right")
    figure.suptitle(
        f"RandomWalks, graph seed {lines[0].seed}: no policy lies above the curve" if lines else "RandomWalks"
    )
    figure.savefig(path, dpi=110)


def _name(axes: Any, lines: list[Line]) -> None:
    """Write names beside the axes, from top to bottom like their points, each joined with its point."""
    ordered = sorted(lines, key=lambda line: -line.optimality)
    for place, line in enumerate(ordered):
        height = 1 - (place + 0.5) / max(len(ordered), 6)
        axes.annotate(
            line.algorithm,
            (line.kl, line.optimality),
            xytext=(1.02, height),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.75", "linewidth": 0.6},
        )


def _measure(name: str, task: Task, exact: Outcomes, directory: Path) -> Line:
    started = time.perf_counter()
    output = directory / name
    shutil.rmtree(output, ignore_errors=True)  # a run that is there already would be continued
    rows = _train(name, task.seed, output)
    seconds = time.perf_counter() - started
    starts, scores, kls = _walks(rows)
    optimality, kl = _mean_over_starts(starts, scores), _mean_over_starts(starts, kls)
    best = frontier_at_kl(exact, kl)
    data = [score for score in map(task.optimality, task.walks) if score is not None]
    is_online = PRESETS[name].kind == "online"
    return Line(
        algorithm=name,
        kind=PRESETS[name].kind,
        seed=task.seed,
        optimality=round(optimality, 4),
        kl=round(kl, 4),
        frontier_optimality=round(best.value, 4),
        # along the frontier's tangent the errors of optimality and KL count together
        standard_error=round(_standard_error(starts, scores - best.beta * kls), 5),
        gap_closed=None if is_online else round((optimality - np.mean(data)) / (1 - np.mean(data)), 4),
        seconds=round(seconds, 1),
    )


def _train(name: str, seed: int, output: Path) -> Path:
    """Run the public command; return the file with the evaluated walks."""
    if name in ONLINE:
        chosen = ("train", "examples/randomwalks.yaml", f"algorithm.name={name}", *COMMON, *OVERRIDES.get(name, ()))
        _concord(*chosen, f"prompts.make.arguments.seed={seed}", f"run.dir={output}", log=output)
        return output / "evaluation" / f"step-{NUM_STEPS}.parquet"
    assert name in OFFLINE, f"{name} is online or offline"
    data = f"data.make.arguments.seed={seed}"
    _concord("offline", f"examples/randomwalks/{name}.yaml", data, f"output={output}", log=output)
    return output / "evaluation.parquet"


def _supervised_start(seed: int, directory: Path) -> str:
    """Train the start that all runs share (they find the same in the cache), and return its directory."""
    output = directory / "start"
    _concord("sft", "examples/randomwalks/sft.yaml", f"data.make.arguments.seed={seed}", f"output={output}", log=output)
    return str(output)


def _concord(*arguments: str, log: Path) -> None:
    with open(f"{log}.log", "w", encoding="utf-8") as file:
        command = [sys.executable, "-m", "cluster.cli", *arguments]
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}; see {log}.log")


def _walks(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return start, optimality and summed log-ratio to the reference of each walk."""
    rows = pq.read_table(path, columns=["prompt_id", "components", "logprobs", "ref_logprobs"]).to_pylist()
    starts = np.array([row["prompt_id"] for row in rows])
    scores = np.array([dict(row["components"])["optimality"] for row in rows])
    kls = [np.sum(np.subtract(row["logprobs"], row["ref_logprobs"], dtype=np.float64)) for row in rows]
    return starts, scores, np.array(kls)


def _mean_over_starts(starts: np.ndarray, values: np.ndarray) -> float:
    return float(np.mean([values[starts == start].mean() for start in np.unique(starts)]))


def _standard_error(starts: np.ndarray, values: np.ndarray) -> float:
    """Return the standard error of the mean over starts of the means of their walks."""
    names = np.unique(starts)
    variances = [values[starts == start].var(ddof=1) / (starts == start).sum() for start in names]
    return float(np.sqrt(np.sum(variances)) / len(names))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1000, help="which graph")
    parser.add_argument("--only", nargs="+", choices=list(PRESETS), help="these algorithms instead of all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at one time; times are comparable with 1 only")
    parser.add_argument("--output", default=os.path.join("runs", "benchmark"), help="where runs and logs go")
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results/")
    return parser.parse_args()


if __name__ == "__main__":
    main()
