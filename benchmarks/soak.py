"""Whether a long run's memory stays flat: 300 steps with a tiny model, every process looked at after each step.

    python -m benchmarks.soak [--steps 300] [--staleness 1] [--output FILE] [--plot FILE.png]

Walks on RandomWalks' graph by a tiny Llama, with all that a run has: Ray processes, DeepSpeed, ledger, redo log,
checkpoints.  Resident memory is what the kernel says; its private part leaves out the pages that a process shares with
others, mapped files and Ray's object store.  For each process a straight line is fitted after step 50.  Prints a table,
and last one line of JSON: `max_slope_mb_per_step`, and the same by process.  Its robust twin is the median of the
second half minus that of the first, over the steps between the halves: one late jump of an allocator moves it less.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.machine import finish
from benchmarks.processes import Memory, memory_of, run_processes
from cluster.config import RunConfig, validate
from cluster.loop import train_step
from cluster.run import Run

SETTLED_AFTER = 50
"""Steps in which allocators, caches and pools may still grow."""
CHECKPOINT_EVERY = 50

Curves = Mapping[str, Sequence[float]]
"""Process -> MB after each step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """How fast a process grows once it has settled, MB a step."""

    slope: float
    """Of the least-squares line."""
    robust: float
    """Between the medians of both halves."""
    start_mb: float
    end_mb: float


def configuration(directory: str, *, num_steps: int, staleness: int, seed: int = 1000) -> RunConfig:
    """Return the run: 20 prompts with 4 walks a step, a Llama of 4 layers, checkpoints every 50 steps."""
    make = {"function": "examples.randomwalks.graph:write_prompts", "arguments": {"seed": seed}}
    architecture = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 23, "max_position_embeddings": 32,
    }  # fmt: skip
    sections = {
        "run": {"dir": directory, "num_steps": num_steps, "checkpoint_every": CHECKPOINT_EVERY},
        "policy": {"model": {"architecture": architecture, "tokenizer": {"characters": "abcdefghijklmnopqrstu"}}},
        "prompts": {"make": make},
        "rollouts": {"prompts_per_step": 20, "samples_per_prompt": 4, "max_new_tokens": 10, "max_rows": 40},
        "reward": {"components": {"optimality": {"function": "examples.randomwalks.rewards:optimality"}}},
        "learner": {"num_minibatches": 2, "microbatch_tokens": 256, "optimizer": {"learning_rate": 1e-4}},
        "algorithm": {"name": "ppo", "kl": {"coef": 0.02}},
        "pipeline": {"max_staleness": staleness},
    }
    return validate(RunConfig, sections, where="benchmarks.soak")


def measure(config: RunConfig) -> dict[str, list[Memory]]:
    """Run all steps; return what each process held after each step; no process is replaced meanwhile."""
    found: dict[str, list[Memory]] = {}
    with Run(config) as run:
        processes = run_processes()
        for step in run.steps():
            train_step(run, step)
            for name, process_id in processes.items():
                found.setdefault(name, []).append(memory_of(process_id))
    return found


def growth(curve: Sequence[float]) -> Growth:
    """Return how a process grows after `SETTLED_AFTER` steps.

    Args:
        curve: MB after each step, at least four steps longer than `SETTLED_AFTER`.
    """
    settled = np.asarray(curve[SETTLED_AFTER:], dtype=np.float64)
    if len(settled) < 4:
        raise ValueError(f"a soak must last at least {SETTLED_AFTER + 4} steps, got {len(curve)}; raise --steps")
    slope = float(np.polyfit(np.arange(len(settled)), settled, 1)[0])
    half = len(settled) // 2
    robust = float(np.median(settled[-half:]) - np.median(settled[:half])) / (len(settled) - half)
    return Growth(slope=slope, robust=robust, start_mb=float(settled[0]), end_mb=float(settled[-1]))


def draw(curves: Curves, path: str) -> None:
    """Draw each process's memory, less what it held when it had settled, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        start = curve[SETTLED_AFTER]
        axes.plot(range(1, len(curve) + 1), [value - start for value in curve], label=f"{name}: {start:.0f} MB")
    axes.axvline(SETTLED_AFTER, color="0.7", linewidth=0.8)
    settled = [value - curve[SETTLED_AFTER] for curve in curves.values() for value in curve[SETTLED_AFTER // 2 :]]
    axes.set_ylim(min(-5.0, min(settled)) - 1, max(5.0, max(settled)) + 1)  # what happens at the start is cut off
    axes.set_xlabel("step")
    axes.set_ylabel(f"MB more than after step {SETTLED_AFTER}")
    axes.legend(title=f"resident after step {SETTLED_AFTER}")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    if arguments.steps < SETTLED_AFTER + 4:
        raise SystemExit(f"--steps must be at least {SETTLED_AFTER + 4}, got {arguments.steps}; raise it")
    with tempfile.TemporaryDirectory() as directory:
        memory = measure(configuration(f"{directory}/run", num_steps=arguments.steps, staleness=arguments.staleness))
    curves = {name: [one.resident for one in held] for name, held in memory.items()}
    resident = {name: growth(curve) for name, curve in curves.items()}
    private = {name: growth([one.private for one in held]) for name, held in memory.items()}
    for name, one in resident.items():
        print(
            f"{name:10} {one.start_mb:7.1f} -> {one.end_mb:7.1f} MB, {one.slope:+.4f} MB a step, robust "
            f"{one.robust:+.4f}, private {private[name].slope:+.4f}"
        )
    if arguments.plot:
        draw(curves, arguments.plot)
    report: dict[str, Any] = {
        "max_slope_mb_per_step": round(max(one.slope for one in resident.values()), 4),
        "slope_mb_per_step": {name: round(one.slope, 4) for name, one in resident.items()},
        "robust_slope_mb_per_step": {name: round(one.robust, 4) for name, one in resident.items()},
        "private_slope_mb_per_step": {name: round(one.slope, 4) for name, one in private.items()},
        "resident_mb": {name: round(one.end_mb, 1) for name, one in resident.items()},
        "num_steps": arguments.steps,
        "staleness": arguments.staleness,
    }
    if arguments.curves:
        report["curves_mb"] = {name: [round(value, 2) for value in curve] for name, curve in curves.items()}
    finish(report, arguments.output)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of the loop")
    parser.add_argument("--staleness", type=int, default=1, help="pipeline.max_staleness")
    parser.add_argument("--curves", action="store_true", help="put the curves themselves into the JSON as well")
    parser.add_argument("--plot", help="draw the curves into this PNG")
    parser.add_argument("--output", help="file for the line of JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
