"""How many tokens a second the learner learns from, by the trunk tokens of one forward-backward.

Workload: groups of one prompt and its responses with random tokens, PPO with a value head on the trunk, one epoch, one
minibatch, float32.  `uniform`: 8 prompts of 44 tokens with 4 responses of 64; `realistic`: 4 prompts of 200 tokens with
8 responses of lognormal lengths, mean 50, at most 128.  One learner steps through all budgets in turn, each repeated;
the medians of wall and CPU time count.  `group` is the budget that holds the largest group and not two.  Prints a
table, and last one line of JSON.

    python -m benchmarks.learner --model DIRECTORY
"""

import os

os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import resource
import statistics
import time

from transformers import AutoConfig

from benchmarks.learner_workload import learner_rank, scored_tables, step_plan, workload
from learner.config import LearnerConfig

BUDGETS = (256, 512, 1024, 2048, 4096)


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    work = workload(arguments.workload)
    base = LearnerConfig.model_validate(
        {"backend": arguments.backend, "zero_stage": arguments.zero_stage, "critic": arguments.critic}
    )
    learner = learner_rank(arguments.model, base, arguments.algorithm, num_threads=arguments.threads)
    vocab_size = AutoConfig.from_pretrained(arguments.model).vocab_size
    tables = scored_tables(work, vocab_size)
    budgets = {"group": work.largest_group} | {str(budget): budget for budget in arguments.budgets}
    plans = {name: step_plan(work, base.model_copy(update={"microbatch_tokens": b})) for name, b in budgets.items()}
    learner.step(tables, plans["group"])  # the first allocations
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in budgets}
    for _ in range(arguments.repeats):
        for name, plan in plans.items():
            start, cpu = time.perf_counter(), time.process_time()
            learner.step(tables, plan)
            seconds[name].append((time.perf_counter() - start, time.process_time() - cpu))
    report: dict[str, float | str] = {"threads": arguments.threads, "num_tokens": int(work.lengths.sum())}
    rates = {}
    for name, spent in seconds.items():
        wall, cpu = (statistics.median(times) for times in zip(*spent, strict=True))
        rates[name] = float(work.lengths.sum()) / wall
        report |= {f"tokens_per_s_{name}": round(rates[name], 2), f"cpu_s_{name}": round(cpu, 2)}
        print(f"{name:>6}: {wall:6.2f} s a step, {cpu:6.2f} CPU-s, {rates[name]:7.1f} tokens/s", flush=True)
    report["best"] = max(rates, key=lambda name: rates[name])
    report["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--workload", choices=("uniform", "realistic"), default="uniform")
    parser.add_argument("--budgets", type=int, nargs="*", default=list(BUDGETS), help="trunk tokens")
    parser.add_argument("--algorithm", default="ppo", help="preset")
    parser.add_argument("--backend", choices=("zero", "local"), default="local")
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--critic", choices=("trunk", "separate"), default="trunk")
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many steps counts")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    return parser.parse_args()


if __name__ == "__main__":
    main()
