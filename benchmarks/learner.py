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
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from transformers import AutoConfig

from actors.config import PolicyConfig
from actors.weights import InProcessTransport
from benchmarks.engine import forced_lengths
from learner.algorithm_config import AlgorithmConfig
from learner.batch import StepContext, StepPlan, plan_step
from learner.config import LearnerConfig
from learner.learner import LearnerRank
from reward.schema import SAMPLES, SCORED

BUDGETS = (256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Groups of one shape."""

    num_groups: int
    num_samples: int
    prompt_tokens: int
    lengths: np.ndarray
    """[groups * samples] response tokens."""

    @property
    def largest_group(self) -> int:
        """Trunk tokens of the longest row that holds one group."""
        sums = self.lengths.reshape(self.num_groups, self.num_samples).sum(1)
        return self.prompt_tokens + int(sums.max())


def workload(name: Literal["uniform", "realistic"]) -> Workload:
    """Return one of the workloads by name."""
    if name == "uniform":
        return Workload(num_groups=8, num_samples=4, prompt_tokens=44, lengths=np.full(32, 64))
    return Workload(num_groups=4, num_samples=8, prompt_tokens=200, lengths=forced_lengths(32, seed=0))


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    work = workload(arguments.workload)
    base = LearnerConfig.model_validate(
        {"backend": arguments.backend, "zero_stage": arguments.zero_stage, "critic": arguments.critic}
    )
    learner = _learner(arguments.model, base, arguments.algorithm, arguments.threads)
    vocab_size = AutoConfig.from_pretrained(arguments.model).vocab_size
    tables = scored_tables(work, vocab_size)
    budgets = {"group": work.largest_group} | {str(budget): budget for budget in arguments.budgets}
    plans = {name: _plan(work, base.model_copy(update={"microbatch_tokens": b})) for name, b in budgets.items()}
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


def _learner(directory: str, config: LearnerConfig, algorithm: str, num_threads: int) -> LearnerRank:
    return LearnerRank(
        model_dir=directory,
        policy=PolicyConfig(model=directory, dtype="float32"),
        learner=config,
        algorithm=AlgorithmConfig(name=algorithm),
        temperature=1.0,
        seed=0,
        rank=0,
        world_size=1,
        device="cpu",
        num_threads=num_threads,
        transport=InProcessTransport(),
        max_new_tokens=128,
    )


def scored_tables(work: Workload, vocab_size: int) -> list[pa.Table]:
    """Return one SCORED table a group: random tokens, each recorded as if all were equally likely."""
    generator = np.random.default_rng(0)
    tables = []
    for group, lengths in enumerate(work.lengths.reshape(work.num_groups, work.num_samples)):
        prompt = generator.integers(3, vocab_size, work.prompt_tokens).tolist()
        rows = [
            {
                "prompt_id": f"p{group}",
                "prompt": "",
                "prompt_ids": prompt,
                "extras": "{}",
                "run_id": "benchmark",
                "incarnation": 0,
                "group_id": f"g{group:03}",
                "sample_index": index,
                "lease_id": group,
                "response_ids": generator.integers(3, vocab_size, length).tolist(),
                "response_text": "",
                "logprobs": [-float(np.log(vocab_size))] * length,
                "policy_versions": [0] * length,
                "loss_mask": [True] * length,
                "finish_reason": "eos",
                "components": [("score", float(generator.normal()))],
                "reward_version": 0,
                "reference_version": 0,
            }
            for index, length in enumerate(int(length) for length in lengths)
        ]
        tables.append(pa.Table.from_pylist(rows, schema=SCORED))
    return tables


def _plan(work: Workload, config: LearnerConfig) -> StepPlan:
    groups = work.lengths.reshape(work.num_groups, work.num_samples)
    rows = [
        {
            "group_id": f"g{group:03}",
            "sample_index": index,
            "num_prompt_tokens": work.prompt_tokens,
            "num_response_tokens": int(length),
            "num_loss_tokens": int(length),
            "finish_reason": "eos",
            "components": [],
            "oldest_version": 0,
            "newest_version": 0,
        }
        for group, lengths in enumerate(groups)
        for index, length in enumerate(lengths)
    ]
    samples = pa.Table.from_pylist(rows, schema=SAMPLES)
    scores = np.random.default_rng(1).normal(size=samples.num_rows)
    return plan_step(samples, scores, learner=config, context=StepContext(step=1, num_steps=1000, seed=0, kl_coef=0.0))


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
