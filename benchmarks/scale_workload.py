"""The work that `benchmarks/scale.py` hands out: a run's configuration, its prompts, and rows of realistic sizes.

The figures are those of a policy with 7 billion parameters that reasons before it answers, one GPU a worker, and are
the same for any number of workers: the step grows with the fleet.
"""

import json
import math
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from actors.config import PromptsConfig
from actors.policy import PromptEncoder
from actors.prompts import PromptSource
from actors.schema import PROMPTS, ROLLOUTS
from cluster.config import RunConfig, validate
from reward.samples import samples_of
from reward.schema import SAMPLES, SCORED

SAMPLES_PER_PROMPT = 16
ROWS = 64
"""Sequences that a worker decodes at the same time."""
TOKENS_PER_S = 2500.0
"""Of one worker with all its rows busy; a row's share does not depend on how many are."""
MEAN_LENGTH, MAX_LENGTH, SIGMA = 4096.0, 16384, 1.0
"""Of the responses, tokens: lognormal, cut at four times the mean, the mean being that after the cut."""
PROMPTS_PER_WORKER = 16
"""Groups of one step for each rollout worker."""
ROLLOUTS_PER_JUDGE = 8
"""Rollout workers for each reward worker."""
ROLLOUTS_PER_RANK = 2
"""Rollout workers for each rank of the learner, for which the driver plans the step."""
MICROBATCH_TOKENS = 65536
JUDGE_S = 2.0
"""A judge's time for one group, seconds; it takes one at a time: 65,536 tokens, 7 billion parameters, 450 TFLOP/s."""
LOAD_S = 2.0
"""From a publication to a worker's acknowledgement, seconds, while it decodes on: 14 GB over 100 Gbit/s, and some."""
LEARN_S = 200.0
"""The learner's time for a step and for gathering its weights, seconds: below the 419 s that generation takes."""
NETWORK_S = 0.0005
"""A message's way from driver to worker or back, seconds."""
BUFFER_BYTES_PER_WORKER = 64 * 2**20
_PROMPT_WORDS = 64
_NUM_PROMPTS = 8192
_VOCABULARY = 32000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What one group's messages weigh, bytes."""

    scored: int
    """Rows that stay in the object store until the redo log takes them."""
    rollouts: int
    """Rows that go from the rollout worker to the judge."""
    samples: int
    """Small answer of SCORE as it is pickled for the driver."""
    numbers: int
    """Small answer of GENERATE."""


def parameters() -> dict[str, float]:
    """Return what is fixed, for the result."""
    return {
        "samples_per_prompt": SAMPLES_PER_PROMPT, "rows": ROWS, "tokens_per_s_per_worker": TOKENS_PER_S,
        "mean_tokens": MEAN_LENGTH, "max_tokens": MAX_LENGTH, "sigma": SIGMA, "prompt_words": _PROMPT_WORDS,
        "prompts_per_step_per_worker": PROMPTS_PER_WORKER, "rollout_workers_per_judge": ROLLOUTS_PER_JUDGE,
        "rollout_workers_per_rank": ROLLOUTS_PER_RANK, "microbatch_tokens": MICROBATCH_TOKENS,
        "judge_s": JUDGE_S, "load_s": LOAD_S, "learn_s": LEARN_S, "network_s": NETWORK_S,
    }  # fmt: skip


def perfect_samples_per_s() -> float:
    """Return what one worker generates whose rows are never idle."""
    return TOKENS_PER_S / MEAN_LENGTH


def config_for(num_workers: int, directory: Path, *, staleness: int, prompts_per_step: int) -> RunConfig:
    """Return the configuration of a run with so many rollout workers."""
    return validate(
        RunConfig,
        {
            "run": {"dir": str(directory / "run"), "num_steps": 1_000_000},
            "policy": {"model": "owner/model", "dtype": "bfloat16"},
            "prompts": {"path": str(directory / "prompts.jsonl")},
            "rollouts": {
                "num_workers": num_workers,
                "prompts_per_step": prompts_per_step,
                "samples_per_prompt": SAMPLES_PER_PROMPT,
                "max_new_tokens": MAX_LENGTH,
                "max_rows": ROWS,
            },
            "reward": {
                "components": {"helpful": {"function": "benchmarks.scale_workload:never_called"}},
                "num_workers": math.ceil(num_workers / ROLLOUTS_PER_JUDGE),
            },
            "learner": {
                "num_ranks": math.ceil(num_workers / ROLLOUTS_PER_RANK),
                "microbatch_tokens": MICROBATCH_TOKENS,
            },
            "algorithm": "grpo",
            "pipeline": {
                "max_staleness": staleness,
                "max_buffer_bytes": BUFFER_BYTES_PER_WORKER * num_workers,
            },
        },
        where="scale",
    )


def never_called(*arguments: Any, **named: Any) -> list[float]:
    """Stand for a judge in the configuration."""
    raise AssertionError("judging is simulated")


def write_prompts(directory: Path) -> None:
    """Write the data set that all runs draw from."""
    words = _words()
    with open(directory / "prompts.jsonl", "w", encoding="utf-8") as file:
        for number in range(_NUM_PROMPTS):
            text = " ".join(random.Random(number).choices(words, k=_PROMPT_WORDS))
            file.write(json.dumps({"prompt": text}) + "\n")


def open_prompts(config: RunConfig, directory: Path) -> PromptSource:
    """Return the real source, with a byte-pair tokenizer trained on such words: drawing encodes the prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY, show_progress=False, special_tokens=["<eos>"])
    tokenizer.train_from_iterator(_words()[:4000], trainer)
    encoder = PromptEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"))
    section = PromptsConfig(path=config.prompts.path)
    return PromptSource(section, encoder, seed=config.run.seed, cache_dir=str(directory / "cache"))


def response_lengths(group_id: str) -> list[int]:
    """Return a group's response lengths, tokens; they hang on nothing but its name."""
    chance = random.Random(group_id)
    location = _location()
    return [min(MAX_LENGTH, max(1, round(math.exp(chance.gauss(location, SIGMA))))) for _ in range(SAMPLES_PER_PROMPT)]


def scored_group(group_id: str) -> pa.Table:
    """Return a group as SCORED, with rows of realistic sizes and content that does not compress well."""
    chance = np.random.default_rng(len(group_id))
    lengths = response_lengths(group_id)
    count = len(lengths)
    prompt = {"prompt_id": group_id, "prompt": "w" * 6 * _PROMPT_WORDS, "prompt_ids": [5] * 128, "extras": "{}"}
    columns: dict[str, Any] = {name: [value] * count for name, value in prompt.items()}
    columns |= {
        "run_id": ["scale"] * count,
        "incarnation": [0] * count,
        "group_id": [group_id] * count,
        "sample_index": list(range(count)),
        "lease_id": [1] * count,
        "response_ids": [chance.integers(0, _VOCABULARY, length) for length in lengths],
        "response_text": [chance.bytes(2 * length).hex() for length in lengths],
        "logprobs": [-chance.exponential(size=length) for length in lengths],
        "policy_versions": [[1] * length for length in lengths],
        "loss_mask": [[True] * length for length in lengths],
        "finish_reason": ["length" if length == MAX_LENGTH else "eos" for length in lengths],
        "components": [[("helpful", float(score))] for score in chance.normal(size=count)],
        "token_scores": [None] * count,
        "score_std": [None] * count,
        "reward_version": [0] * count,
        "ref_logprobs": [-chance.exponential(size=length) for length in lengths],
        "reference_version": [0] * count,
    }
    return pa.table({name: pa.array(columns[name], SCORED.field(name).type) for name in SCORED.names}, schema=SCORED)


def rollouts_of(scored: pa.Table) -> pa.Table:
    """Return the rows as they were before they were judged."""
    return scored.select(ROLLOUTS.names).cast(ROLLOUTS)


def samples_named(samples: pa.Table, group_id: str) -> pa.Table:
    """Return a group's SAMPLES as those of another group."""
    names = pa.array([group_id] * samples.num_rows, pa.string())
    return samples.set_column(SAMPLES.names.index("group_id"), SAMPLES.field("group_id"), names).cast(SAMPLES)


def some_samples(count: int) -> list[pa.Table]:
    """Return SAMPLES of so many groups."""
    return [samples_of(scored_group(f"0/template-{number}")) for number in range(count)]


def prompt_row() -> pa.Table:
    """Return a prompt as it travels to a worker."""
    row = {"prompt_id": "p", "prompt": "w" * 6 * _PROMPT_WORDS, "prompt_ids": [5] * 128, "extras": "{}"}
    return pa.Table.from_pylist([row], schema=PROMPTS)


@cache
def _location() -> float:
    """Return the logarithm's mean for which the lengths' mean after the cut is `MEAN_LENGTH`."""
    low, high, normal = 0.0, 2 * math.log(MEAN_LENGTH), NormalDist()
    for _ in range(60):
        middle = (low + high) / 2
        cut = (math.log(MAX_LENGTH) - middle) / SIGMA
        mean = math.exp(middle + SIGMA**2 / 2) * normal.cdf(cut - SIGMA) + MAX_LENGTH * (1 - normal.cdf(cut))
        low, high = (middle, high) if mean < MEAN_LENGTH else (low, middle)
    return low


def _words() -> list[str]:
    chance = random.Random(0)
    return ["".join(chance.choices("etaoinshrdlucm", k=chance.randint(2, 8))) for _ in range(20_000)]
