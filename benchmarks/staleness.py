"""How well RandomWalks is learnt from samples of older policies, with and without the correction for it.

PPO at `pipeline.max_staleness` 0, 1 and 4, through the public command line.  All runs have the same settings: those of
`benchmarks/randomwalks.py` with a quarter of the learning rate, one pass over a step's walks and twice the steps.  With
the full rate the policy moves so far in a step that feedback from four versions ago overshoots: it learns fast, then
forgets to end its walks.

Corrected (what the configuration does by default): old log-probs are recomputed and each token weighs the truncated
old / recorded.  Not corrected, in two ways: `recorded`, the sampling policy stands for the old one, so that clipping is
around it; `unweighted`, old log-probs are recomputed and nothing is weighed.

    python -m benchmarks.staleness [--seed 1000] [--output FILE]

Prints a line for each run, and last one line of JSON: for each run the mean optimality of the trained policy on
held-out random numbers, at temperature 1 (1 = every walk as short as possible).
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import finish
from benchmarks.randomwalks import COMMON
from cluster.metrics import read_journal
from cluster.storage import RunStorage

NUM_STEPS = 80
CALM = (
    f"run.num_steps={NUM_STEPS}",
    f"run.checkpoint_every={NUM_STEPS}",
    f"evaluation.every={NUM_STEPS}",
    "learner.epochs=1",
    "learner.optimizer.learning_rate=1.0e-4",
)
"""Of every run, after `randomwalks.COMMON`."""

_RECORDED = ("algorithm.off_policy.old_logprobs=recorded",)
_UNWEIGHTED = ("algorithm.off_policy.old_logprobs=recomputed", "algorithm.off_policy.weight=none")
SETTINGS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "staleness_0": (0, ()),
    "staleness_1": (1, ()),
    "staleness_4": (4, ()),
    "staleness_1_off": (1, _RECORDED),
    "staleness_4_off": (4, _RECORDED),
    "staleness_1_unweighted": (1, _UNWEIGHTED),
    "staleness_4_unweighted": (4, _UNWEIGHTED),
}
"""Name of a run -> `pipeline.max_staleness`, and what else is set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one run."""

    optimality: float
    """Of the trained policy, held-out."""
    mean_staleness: float
    """Versions between sampling and learning, over all tokens learnt from."""
    mismatch_ess: float
    """Effective sample size of the importance weights as a share of the tokens, mean over steps."""


def main() -> None:
    """Run all settings and print."""
    arguments = _arguments()
    report: dict[str, Any] = {"seed": arguments.seed}
    for name in arguments.only or SETTINGS:
        found = _measure(name, arguments.seed, Path(arguments.directory) / str(arguments.seed))
        print(
            f"{name:24} optimality {found.optimality:.3f}  mean staleness {found.mean_staleness:.2f}  "
            f"effective sample size {found.mismatch_ess:.3f}",
            flush=True,
        )
        report[name] = round(found.optimality, 4)
        report[f"{name}_seen"] = round(found.mean_staleness, 3)
        report[f"{name}_ess"] = round(found.mismatch_ess, 4)
    finish(report, arguments.output)


def outcome(rows: Sequence[Mapping[str, Any]]) -> Outcome:
    """Return what a run's metric rows say; tokens count alike, so steps count by their tokens."""
    steps = [row for row in rows if "num_tokens" in row]
    tokens = sum(row["num_tokens"] for row in steps)
    return Outcome(
        optimality=rows[-1]["eval_optimality_mean"],
        # a run at staleness 0 does not report it
        mean_staleness=sum(row.get("staleness_mean", 0.0) * row["num_tokens"] for row in steps) / tokens,
        mismatch_ess=statistics.fmean(row["mismatch_ess"] for row in steps),
    )


def _measure(name: str, seed: int, directory: Path) -> Outcome:
    staleness, others = SETTINGS[name]
    output = directory / name
    shutil.rmtree(output, ignore_errors=True)  # a run that is there already would be continued
    directory.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "cluster.cli", "train", "examples/randomwalks.yaml", *COMMON, *CALM, *others,
        "algorithm.name=ppo", f"pipeline.max_staleness={staleness}", f"prompts.make.arguments.seed={seed}",
        f"run.dir={output}",
    ]  # fmt: skip
    with open(f"{output}.log", "w", encoding="utf-8") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}; see {output}.log")
    return outcome(read_journal(RunStorage(str(output))))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1000, help="which graph")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), help="these runs instead of all")
    parser.add_argument("--directory", default=os.path.join("runs", "staleness"), help="where runs and logs go")
    parser.add_argument("--output", help="file for the line of JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
