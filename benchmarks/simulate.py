"""Thousands of training runs under seeded faults, in one process each: is anything lost, trained twice, left hanging?

The ledger, dispatcher, pipeline, redo log, learner recovery, checkpoints and the loop are the code that ships; time,
workers, ranks and the disk's moods are `tests/simulated_*.py`'s.  A seed is a schedule, and replays exactly:

    python -m benchmarks.simulate --schedules 2000 --jobs 2
    python -m benchmarks.simulate --seed 1234 --verbose
    python -m benchmarks.simulate --planted --schedules 200     each planted bug must be found

Prints progress, each schedule that went wrong, and last one line of JSON: `lost` and `duplicated` count groups,
`unresolved` (no end, or one that is not allowed) and `wrong` (other weights, metrics or counts than there should be)
count schedules, `gave_up` those that ended in a typed error because their budgets were exhausted, `typed_errors` such
ends after which another driver went on, `uninformative` groups that dynamic sampling dropped (a share of the data sets
runs with it), `faults` what was injected.  The exit status is 0 when all is well and every kind of fault has been
injected.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

from tests.simulated_mutants import MUTANTS
from tests.simulated_verdict import Verdict, judge
from tests.simulated_world import CHANCES, DATA_FAULTS

_CHUNK = 25
_ENOUGH = 1000
"""Schedules in which every kind of fault must occur."""


def main() -> int:
    """Simulate, print, and return the exit status."""
    arguments = _arguments()
    if arguments.seed is not None:
        verdict = judge(arguments.seed, say=print if arguments.verbose else None)
        print(verdict if not verdict.is_good else f"seed {verdict.seed}: nothing went wrong")
        return int(not verdict.is_good)
    if arguments.planted:
        return _find_planted(range(arguments.first, arguments.first + arguments.schedules))
    return _simulate(range(arguments.first, arguments.first + arguments.schedules), jobs=arguments.jobs)


def judge_all(seeds: Iterable[int]) -> list[Verdict]:
    """Return the verdict on each seed."""
    return [judge(seed) for seed in seeds]


def report(verdicts: Iterable[Verdict]) -> dict[str, object]:
    """Return the figures of some schedules."""
    verdicts = list(verdicts)
    faults = sum((verdict.injected for verdict in verdicts), Counter[str]())
    typed = sum((verdict.typed for verdict in verdicts), Counter[str]())
    return {
        "schedules": len(verdicts),
        "lost": sum(len(verdict.lost) for verdict in verdicts),
        "duplicated": sum(len(verdict.duplicated) for verdict in verdicts),
        "unresolved": sum(bool(verdict.unresolved) for verdict in verdicts),
        "wrong": sum(bool(verdict.wrong) for verdict in verdicts),
        "gave_up": sum(bool(verdict.gave_up) for verdict in verdicts),
        "uninformative": sum(verdict.num_uninformative for verdict in verdicts),
        "drivers": sum(verdict.num_starts for verdict in verdicts),
        "typed_errors": dict(sorted(typed.items())),
        "faults": dict(sorted(faults.items())),
        "never_injected": sorted({*CHANCES, *DATA_FAULTS} - set(faults)),
    }


def _simulate(seeds: range, *, jobs: int) -> int:
    started = time.perf_counter()
    verdicts: list[Verdict] = []
    for chunk in _judged(seeds, jobs):
        verdicts += chunk
        for verdict in chunk:
            if not verdict.is_good:
                print(str(verdict)[:1000], flush=True)
        num_bad = sum(not verdict.is_good for verdict in verdicts)
        print(
            f"{len(verdicts)}/{len(seeds)} schedules, {num_bad} bad, {time.perf_counter() - started:.0f} s", flush=True
        )
    figures = report(verdicts) | {"seconds": round(time.perf_counter() - started, 1)}
    print(json.dumps(figures))
    is_covered = len(seeds) < _ENOUGH or not figures["never_injected"]
    return int(any(not verdict.is_good for verdict in verdicts) or not is_covered)


def _judged(seeds: range, jobs: int) -> Iterator[list[Verdict]]:
    chunks = [seeds[start : start + _CHUNK] for start in range(0, len(seeds), _CHUNK)]
    if jobs == 1:
        yield from map(judge_all, chunks)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(judge_all, chunks)


def _find_planted(seeds: range) -> int:
    """Print for each planted bug the first seed that finds it."""
    started = time.perf_counter()
    found: dict[str, int | None] = {}
    for name, planted in MUTANTS.items():
        first = next((verdict for seed in seeds if not (verdict := judge(seed, planted=planted)).is_good), None)
        found[name] = None if first is None else first.seed
        print(f"{name}: {'not found' if first is None else str(first)[:160]}", flush=True)
    print(json.dumps({"planted": found, "seconds": round(time.perf_counter() - started, 1)}))
    return int(None in found.values())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=200, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seed", type=int, help="replay this one")
    parser.add_argument("--verbose", action="store_true", help="print what happens in the replay")
    parser.add_argument("--planted", action="store_true", help="plant each bug in turn, and look for it")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
