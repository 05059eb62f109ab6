"""How much time generating and learning at the same time saves, at staleness 0, 1 and 2.

A real run (Ray processes, DeepSpeed, ledger, redo log) in which generation has one core of its own and learning the
other, at every staleness, so that only the overlap differs.  Response lengths are forced and long-tailed, the same ones
in every run; the reward is trivial.  The prompts' length is chosen first so that both stages take equally long, where
overlapping can win most: a longer prompt costs the learner more than the engine.  A stage alone is what nothing can be
faster than: the worker generating the same groups without ever waiting, the learner learning while nobody generates.

    python -m benchmarks.overlap [--steps 10] [--rows 8] [--output FILE]

Prints a line for each measurement, and last one line of JSON: `overlap_ratio`, the time of a step at staleness 1 over
the slower stage alone; `speedup_over_sync`, the time at staleness 0 over that at staleness 1.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

import actors.rollout_worker
import cluster.session
from actors.engine import Request, SamplingParams
from actors.rollout_worker import Lease, RolloutWorker
from actors.schema import PROMPTS
from actors.torch_engine import TorchEngine
from benchmarks.machine import finish
from benchmarks.processes import DRIVER, pin, run_processes
from cluster.config import RunConfig, validate
from cluster.loop import train_step
from cluster.run import Run
from reward.reward_worker import RewardWorker

PROMPTS_PER_STEP, SAMPLES_PER_PROMPT = 12, 8
MEAN_LENGTH, MAX_LENGTH, SIGMA = 48.0, 192, 0.9
"""Of the responses, tokens: lognormal, cut at four times the mean."""
WARM_UP_STEPS = 2
MAX_STAGE_RATIO = 1.1
TRIED_PROMPT_LENGTHS = (8, 96, 192)
MAX_PROMPT_LENGTH = 384
_ALPHABET = "".join(chr(0x4E00 + index) for index in range(4094))  # with <pad> and <eos> 4,096 tokens
_ALONE_LEASE = 1_000_000
"""First lease id of groups that are generated again, for their time alone."""


class ForcedLengthEngine(TorchEngine):
    """Generates as many tokens as `forced_lengths` says."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests with forced lengths."""
        super().submit([replace(r, forced_lengths=forced_lengths(r.seed, r.num_samples)) for r in requests])


class ForcedLengthRolloutWorker(RolloutWorker):
    """A rollout worker whose engine is a `ForcedLengthEngine`."""

    def __init__(self, **arguments: Any) -> None:
        actors.rollout_worker.TorchEngine = ForcedLengthEngine  # type: ignore[misc]
        super().__init__(**arguments)


class TrivialRewardWorker(RewardWorker):
    """A reward worker without a reference policy."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{**arguments, "policy_dir": None})


def forced_lengths(seed: int, num_samples: int) -> tuple[int, ...]:
    """Return a group's response lengths, a pure function of its seed: lognormal, at most `MAX_LENGTH` tokens."""
    shape = np.random.default_rng(seed).standard_normal(num_samples) * SIGMA - SIGMA**2 / 2  # mean of exp: 1
    return tuple(int(length) for length in np.clip(np.rint(MEAN_LENGTH * np.exp(shape)), 1, MAX_LENGTH))


def trivial_reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Return scores that cost nothing and differ."""
    return [float(len(completion) % 5) for completion in completions]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Seconds a step of each stage alone."""

    generate_s: float
    learn_s: float

    @property
    def slower_s(self) -> float:
        """The slower stage's seconds: no pipeline of the two is faster."""
        return max(self.generate_s, self.learn_s)

    @property
    def ratio(self) -> float:
        """The slower stage over the faster one."""
        return self.slower_s / min(self.generate_s, self.learn_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """Which core generates, and which one learns and drives."""

    generation: int
    learning: int

    def take(self) -> None:
        """Pin the processes of the run that is up."""
        for name, process_id in run_processes().items():
            pin(process_id, {self.generation if name.startswith("rollout") else self.learning})

    def free(self) -> None:
        """Unpin the driver, so that what it starts is not pinned with it."""
        pin(run_processes()[DRIVER], {self.generation, self.learning})


def configuration(directory: str, prompt_lengths: Sequence[int], **settings: Mapping[str, Any]) -> RunConfig:
    """Return a run whose step n has prompts of `prompt_lengths[n - 1]` tokens; the prompts are written.

    Args:
        directory: a new one; prompts and run go there.
        prompt_lengths: one a step.
        settings: sections merged in.
    """
    path = Path(directory) / "prompts.parquet"
    path.parent.mkdir(parents=True)
    generator = np.random.default_rng(0)
    lengths = np.repeat(prompt_lengths, PROMPTS_PER_STEP)
    texts = ["".join(_ALPHABET[i] for i in generator.integers(0, len(_ALPHABET), length)) for length in lengths]
    rows = [{"id": f"{index:06}", "prompt": text} for index, text in enumerate(texts)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    architecture = {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 4096, "max_position_embeddings": 1024,
    }  # fmt: skip
    sections: dict[str, dict[str, Any]] = {
        "run": {"dir": f"{directory}/run", "num_steps": len(prompt_lengths), "checkpoint_every": 10**6},
        "policy": {"model": {"architecture": architecture, "tokenizer": {"characters": _ALPHABET}}},
        "prompts": {"path": str(path), "shuffle": False},
        "rollouts": {
            "prompts_per_step": PROMPTS_PER_STEP, "samples_per_prompt": SAMPLES_PER_PROMPT,
            "max_new_tokens": MAX_LENGTH,
        },
        "reward": {"components": {"trivial": {"function": "benchmarks.overlap:trivial_reward"}}},
        "learner": {"num_minibatches": 4, "microbatch_tokens": 512, "optimizer": {"learning_rate": 1e-6}},
        "algorithm": {"name": "ppo", "kl": {"coef": 0.0}},
        "placement": {"rollout_threads": 1, "learner_threads": 1, "reward_threads": 1},
    }  # fmt: skip
    merged = {name: {**section, **settings.get(name, {})} for name, section in sections.items()}
    return validate(RunConfig, {**settings, **merged}, where="benchmarks.overlap")


class Bench:
    """Measures settings one after the other, each in a run of its own.

    Args:
        directory: where the runs are.
        cores: for generation and learning.
        num_steps: timed ones.
        max_rows: samples that the worker decodes together.
    """

    def __init__(self, directory: str, cores: Cores, *, num_steps: int, max_rows: int) -> None:
        self._directory = directory
        self._cores = cores
        self._num_steps = num_steps
        self._max_rows = max_rows
        self._num_runs = 0

    def stages(self, prompt_lengths: Sequence[int]) -> dict[int, Stages]:
        """Return prompt length -> each stage alone; every length is measured on all steps that have it.

        Old log-probs are recomputed, as they are where stages overlap.
        """
        lengths = [prompt_lengths[0]] * WARM_UP_STEPS + list(prompt_lengths)
        settings = {"algorithm": {"name": "ppo", "kl": {"coef": 0.0}, "off_policy": {"old_logprobs": "recomputed"}}}
        learn_s: dict[int, list[float]] = {}
        tables: dict[int, list[pa.Table]] = {}
        with self._run(lengths, settings) as run:
            for step, length in zip(run.steps(), lengths, strict=True):
                batch = run.take_batch(step)
                result = run.learn(batch)
                run.publish(step)
                run.record(step, batch, result)
                if step > WARM_UP_STEPS:
                    learn_s.setdefault(length, []).append(result.metrics["learn_s"])
                    tables.setdefault(length, []).append(run.tables(batch))
            generate_s = {length: generation_alone(run.config, rounds) for length, rounds in tables.items()}
        return {
            length: Stages(generate_s=generate_s[length], learn_s=statistics.fmean(learn_s[length]))
            for length in learn_s
        }

    def equal_stages(self) -> tuple[int, Stages]:
        """Return a prompt length at which the stages take equally long, within `MAX_STAGE_RATIO`, and their times."""
        known = self.stages([length for length in TRIED_PROMPT_LENGTHS for _ in range(2)])
        for _ in range(3):
            for length, stages in known.items():
                show(f"prompts of {length} tokens", stages)
            length = balanced_length(known)
            known = {length: self.stages([length] * self._num_steps)[length], **known}
            if known[length].ratio <= MAX_STAGE_RATIO:
                break
        show(f"chosen: prompts of {length} tokens", known[length])
        return length, known[length]

    def step_s(self, length: int, staleness: int) -> tuple[float, dict[str, float]]:
        """Return seconds a step at a staleness, and means of the metrics that say who waited and for what."""
        timed_until = WARM_UP_STEPS + self._num_steps
        # Steps beyond the timed ones, so that in these as much is generated as is learnt.
        lengths = [length] * (timed_until + staleness + 1)
        with self._run(lengths, {"pipeline": {"max_staleness": staleness}}) as run:
            steps = run.steps()
            for _ in range(WARM_UP_STEPS):
                train_step(run, next(steps))
            started = time.perf_counter()
            rows = [train_step(run, next(steps)) for _ in range(self._num_steps)]
            seconds = (time.perf_counter() - started) / self._num_steps
        names = [name for name in rows[0] if name.startswith(("idle_", "staleness_"))]
        return seconds, {name: round(statistics.fmean(row.get(name, 0.0) for row in rows), 4) for name in names}

    def _run(self, lengths: Sequence[int], settings: Mapping[str, Mapping[str, Any]]) -> Run:
        self._cores.free()
        self._num_runs += 1
        rollouts = {"max_rows": self._max_rows}
        config = configuration(f"{self._directory}/{self._num_runs}", lengths, rollouts=rollouts, **settings)
        cluster.session.RolloutWorker = ForcedLengthRolloutWorker  # type: ignore[misc]
        cluster.session.RewardWorker = TrivialRewardWorker  # type: ignore[misc]
        run = Run(config)
        self._cores.take()
        return run


def generation_alone(config: RunConfig, rounds: Sequence[pa.Table]) -> float:
    """Return the seconds a round that the run's one rollout worker takes when all rounds are given to it at once."""
    name = next(name for name in ray.util.list_named_actors() if "/rollout" in name)
    worker = ray.get_actor(name)
    references: list[Any] = []
    started = time.perf_counter()
    for lease_id, group in enumerate(groups_of(rounds), start=_ALONE_LEASE):
        lease = Lease(
            lease_id=lease_id,
            epoch=0,
            group_id=group["group_id"][0].as_py(),
            incarnation=0,
            num_samples=SAMPLES_PER_PROMPT,
            sampling=SamplingParams(max_new_tokens=MAX_LENGTH),
            seed=config.run.seed,
        )
        references.append(worker.generate.remote(group.select(PROMPTS.names).cast(PROMPTS), lease))
    ray.get(references)
    return (time.perf_counter() - started) / len(rounds)


def groups_of(rounds: Sequence[pa.Table]) -> list[pa.Table]:
    """Return each group's first row."""
    rows = pa.concat_tables(rounds)
    firsts = np.flatnonzero(rows["sample_index"].to_numpy() == 0)
    return [rows.slice(int(index), 1) for index in firsts]


def balanced_length(known: Mapping[int, Stages]) -> int:
    """Return the prompt length at which learning takes as long as generating, on a straight line through what is known.

    Example: generation 1.0 s at 0 and at 100 tokens, learning 0.8 s and 1.3 s: they meet at 40 tokens.
    """
    lengths = list(known)
    slope, offset = np.polyfit(lengths, [known[n].learn_s - known[n].generate_s for n in lengths], 1)
    length = round(-offset / slope) if slope > 0 else -1
    if not 1 <= length <= MAX_PROMPT_LENGTH:
        raise SystemExit(
            f"stages must be equally long for some prompt length in 1..{MAX_PROMPT_LENGTH}, got {length}; set "
            "--rows: more rows make generating cheaper"
        )
    return length


def show(what: str, stages: Stages) -> None:
    """Print the times of both stages."""
    print(f"{what}: generating {stages.generate_s:.2f} s, learning {stages.learn_s:.2f} s a step", flush=True)


def summary(stages: Stages, step_s: Mapping[int, float]) -> dict[str, float]:
    """Return the figures of the last line.

    Args:
        stages: alone.
        step_s: staleness -> seconds a step, for 0, 1 and 2.
    """
    return {
        "overlap_ratio": round(step_s[1] / stages.slower_s, 3),
        "speedup_over_sync": round(step_s[0] / step_s[1], 3),
        "staleness_0_ratio": round(step_s[0] / stages.slower_s, 3),
        "staleness_2_ratio": round(step_s[2] / stages.slower_s, 3),
        "stage_ratio": round(stages.ratio, 3),
        "generate_alone_s": round(stages.generate_s, 3),
        "learn_alone_s": round(stages.learn_s, 3),
        **{f"staleness_{staleness}_s": round(seconds, 3) for staleness, seconds in step_s.items()},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each setting")
    parser.add_argument("--rows", type=int, default=8, help="samples decoded together; more make generating cheaper")
    parser.add_argument("--output", help="file for the line of JSON")
    arguments = parser.parse_args()
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        raise SystemExit(f"two cores must be available, one for each stage, got {available}; use another machine")
    with tempfile.TemporaryDirectory() as directory:
        cores = Cores(generation=available[0], learning=available[1])
        bench = Bench(directory, cores, num_steps=arguments.steps, max_rows=arguments.rows)
        length, stages = bench.equal_stages()
        step_s, waits = {}, {}
        for staleness in (0, 1, 2):
            step_s[staleness], waits[staleness] = bench.step_s(length, staleness)
            print(f"staleness {staleness}: {step_s[staleness]:.2f} s a step, {waits[staleness]}", flush=True)
    report = {**summary(stages, step_s), "prompt_tokens": length, "num_steps": arguments.steps, "metrics": waits}
    finish(report, arguments.output)


if __name__ == "__main__":
    main()
