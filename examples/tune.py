"""Try several learning rates on RandomWalks with Ray Tune, some at a time, and say which was best.

    python -m examples.tune                                4 trials, a few minutes on two cores
    python -m examples.tune --num-trials 8 --steps 50

Each trial is a run with a directory of its own; a sweep over something else is another `tune.grid_search` in `main`.
"""

import argparse
import os
from collections.abc import Mapping
from typing import Any

import ray
from ray import tune
from rich.console import Console
from rich.table import Table

from cluster.rllib import RLHF, RLHFConfig

METRIC = "eval_score_mean"
"""Of the held-out prompts, after the last step."""


def sweep(*, num_trials: int, steps: int, storage: str) -> tune.ResultGrid:
    """Run the trials; a failed one is in the result with its error."""
    # What Ray's books give a trial decides how many there are at a time: on two cores, two of four.
    cores = max(1, int(ray.cluster_resources()["CPU"]) // num_trials)
    config = (
        RLHFConfig()
        .from_yaml("examples/randomwalks.yaml")
        .run(num_steps=steps)
        .learners(optimizer={"learning_rate": tune.grid_search(rates(num_trials))})
        .section("placement", cores=cores)
    )
    tuner = tune.Tuner(
        RLHF,
        param_space=config,
        tune_config=tune.TuneConfig(trial_dirname_creator=lambda trial: f"rate-{rate_of(trial.config)}"),
        run_config=tune.RunConfig(storage_path=os.path.abspath(storage), verbose=1),
    )
    return tuner.fit()


def rates(count: int) -> list[float]:
    """Return learning rates around that of the example, each twice the one before it."""
    return [4e-4 * 2.0 ** (index - (count - 1) // 2) for index in range(count)]


def rate_of(config: Mapping[str, Any]) -> float:
    """Return a trial's learning rate."""
    rate: float = config["sections"]["learner"]["optimizer"]["learning_rate"]
    return rate


def table(results: tune.ResultGrid) -> Table:
    """Return a line for each trial, in the order of their rates."""
    columns = Table("learning rate", "held-out score", "KL", "steps", "minutes", "run directory")
    for index, rate in enumerate(rates(len(results))):
        result = results[index]
        row = result.metrics or {}
        figures = (
            [
                f"{row[METRIC]:.3f}",
                f"{row['kl']:.2f}",
                str(row["training_iteration"]),
                f"{row['time_total_s'] / 60:.1f}",
            ]
            if METRIC in row and result.error is None
            else [f"failed: {type(result.error).__name__}", "", "", ""]
        )
        columns.add_row(f"{rate:g}", *figures, os.path.relpath(result.path))
    return columns


def main() -> None:
    """Read the arguments, run the sweep, print its table and its best trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-trials", type=int, default=4, help="learning rates to try (4)")
    parser.add_argument("--steps", type=int, default=30, help="steps of each trial (30)")
    parser.add_argument("--storage", default="runs/tune", help="where trials are kept (runs/tune)")
    arguments = parser.parse_args()
    ray.init(log_to_driver=False)
    results = sweep(num_trials=arguments.num_trials, steps=arguments.steps, storage=arguments.storage)
    console = Console(width=160)
    console.print(table(results))
    if results.num_errors < len(results):
        best = results.get_best_result(METRIC, "max")
        directory = os.path.relpath(best.path)
        console.print(f"best: learning rate {rate_of(best.config or {}):g}, its policy is in {directory}/policy")
        console.print(f"look at it:  concord report {directory}")
    else:
        raise SystemExit(f"all trials failed, the first because of {results.errors[0]}")


if __name__ == "__main__":
    main()
