"""Groups of random tokens for the learner's benchmarks, and a learner in this process."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from actors.config import PolicyConfig
from actors.weights import InProcessTransport, WeightTransport
from benchmarks.engine_workload import spread_lengths
from learner.algorithm_config import AlgorithmConfig
from learner.batch import StepContext, StepPlan, plan_step
from learner.config import LearnerConfig
from learner.learner import LearnerRank
from reward.schema import SAMPLES, SCORED


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
    return Workload(num_groups=4, num_samples=8, prompt_tokens=200, lengths=spread_lengths(32))


def learner_rank(
    directory: str,
    config: LearnerConfig,
    algorithm: str,
    *,
    num_threads: int,
    device: str = "cpu",
    dtype: Literal["auto", "float32", "bfloat16"] = "float32",
    transport: WeightTransport | None = None,
) -> LearnerRank:
    """Return a learner of one rank, of a model directory."""
    return LearnerRank(
        model_dir=directory,
        policy=PolicyConfig(model=directory, dtype=dtype),
        learner=config,
        algorithm=AlgorithmConfig(name=algorithm),
        temperature=1.0,
        seed=0,
        rank=0,
        world_size=1,
        device=device,
        num_threads=num_threads,
        transport=transport or InProcessTransport(),
        max_new_tokens=1024,
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


def step_plan(work: Workload, config: LearnerConfig) -> StepPlan:
    """Return how a learner takes one step over a workload, its scores random."""
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
