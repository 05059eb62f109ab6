"""What the comparisons of engines generate: the same prompts, the same number of tokens, engine after engine.

Response lengths are forced, so that every engine draws the same number of tokens.  Cost is the process's CPU time, so
neighbours on the machine disturb little.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.engine import Engine, Request, SamplingParams
from actors.sampling import group_seed

NUM_SAMPLES = 4
MEAN_LENGTH, MAX_LENGTH = 50.0, 128
SIGMA = 0.9
"""Spread of the lognormal lengths: about five of 64 reach the cap."""
EVEN_LENGTH, EVEN_AT_CAP = 64, 0.72
"""The cap of the workload with little spread, and the share of responses that reach it."""

_TOPICS = (
    "a heist", "a lonely robot", "two sisters", "the last whale", "a haunted hotel", "a jazz pianist", "a road trip",
    "a chess prodigy", "life on Mars", "a small-town mayor", "a forbidden romance", "an arctic rescue",
    "a spy who quits", "a talking dog", "the fall of Rome", "a bakery that moves into another street",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts with several samples each."""

    prompts: list[list[int]]
    lengths: np.ndarray
    """[P, N] tokens of each response."""

    @property
    def num_tokens(self) -> int:
        """Tokens to draw."""
        return int(self.lengths.sum())

    @property
    def sequences(self) -> list[tuple[list[int], int]]:
        """Every sample's prompt and length, samples of a prompt side by side."""
        num_samples = self.lengths.shape[1]
        prompts = [prompt for prompt in self.prompts for _ in range(num_samples)]
        return list(zip(prompts, self.lengths.ravel().tolist(), strict=True))


def spread_workload(tokenizer: PreTrainedTokenizerBase) -> Workload:
    """Return 16 chat prompts with lognormal lengths, mean 50, at most 128 tokens."""
    prompts = _prompts(tokenizer, 16)
    return Workload(prompts, spread_lengths(len(prompts) * NUM_SAMPLES).reshape(len(prompts), NUM_SAMPLES))


def even_workload(tokenizer: PreTrainedTokenizerBase) -> Workload:
    """Return 8 chat prompts whose responses mostly reach a cap of 64 tokens: little for a queue of samples to win."""
    prompts = _prompts(tokenizer, 8)
    random = np.random.default_rng(0)
    shape = len(prompts), NUM_SAMPLES
    ended = random.integers(EVEN_LENGTH // 4, EVEN_LENGTH, size=shape)
    return Workload(prompts, np.where(random.random(shape) < EVEN_AT_CAP, EVEN_LENGTH, ended))


def spread_lengths(count: int) -> np.ndarray:
    """Return [count] lognormal lengths, capped, whose mean is as near to `MEAN_LENGTH` as whole tokens allow."""
    shape = np.exp(SIGMA * np.random.default_rng(0).standard_normal(count))
    low, high = 1.0, 10.0 * MEAN_LENGTH
    for _ in range(60):  # the cap bends the mean, so the scale is found by bisection
        scale = (low + high) / 2
        lengths: np.ndarray = np.clip(np.rint(scale * shape), 1, MAX_LENGTH).astype(int)
        low, high = (scale, high) if lengths.mean() < MEAN_LENGTH else (low, scale)
    return lengths


def run_engine(engine: Engine, workload: Workload) -> None:
    """Draw every sample with an engine of ours."""
    requests = [
        Request(
            request_id=str(index),
            prompt_ids=prompt,
            num_samples=len(lengths),
            seed=group_seed(0, str(index)),
            sampling=SamplingParams(max_new_tokens=MAX_LENGTH),
            forced_lengths=tuple(lengths),
        )
        for index, (prompt, lengths) in enumerate(zip(workload.prompts, workload.lengths.tolist(), strict=True))
    ]
    engine.submit(requests)
    num_tokens = 0
    while engine.has_work:
        num_tokens += sum(len(completion.response_ids) for completion in engine.step())
    assert num_tokens == workload.num_tokens, "the engine drew every forced token"


def run_generate(model: PreTrainedModel, workload: Workload, rows: int) -> None:
    """Draw every sample with `generate`: left-padded batches of `rows`, each of which runs to its longest response."""
    sequences = workload.sequences
    for start in range(0, len(sequences), rows):
        batch = sequences[start : start + rows]
        width, longest = max(len(prompt) for prompt, _ in batch), max(length for _, length in batch)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
        output = model.generate(  # type: ignore[operator]
            ids, attention_mask=mask, do_sample=True, top_k=0, min_new_tokens=longest, max_new_tokens=longest,
            pad_token_id=0,
        )  # fmt: skip
        assert output.shape[1] == width + longest, "generate ran to the longest forced length"


def warm_up(model: PreTrainedModel, workload: Workload) -> None:
    """Draw a few tokens, so that what happens once is not timed."""
    run_generate(model, Workload(workload.prompts[:1], np.full((1, NUM_SAMPLES), 4)), NUM_SAMPLES)


def cpu_seconds_in_turn(tasks: Sequence[Callable[[], None]], *, repeats: int) -> list[float]:
    """Return each task's median CPU-seconds, the tasks run in turn so that drifts of the machine meet all alike."""
    spent: list[list[float]] = [[] for _ in tasks]
    for _ in range(repeats):
        for task, seconds in zip(tasks, spent, strict=True):
            start = time.process_time()
            task()
            seconds.append(time.process_time() - start)
    return [statistics.median(seconds) for seconds in spent]


def demo_model() -> str:
    """Return the directory of the demo's SmolLM2, fetched and converted if needed."""
    from actors.cache import cache_directory
    from examples.movie_reviews.assets import smollm2

    directory: str = smollm2(cache_directory())
    return directory


def common_arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of what every comparison of engines asks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="model directory; without it the demo's SmolLM2, fetched and converted if needed"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32], help="rows decoded together")
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many runs counts")
    parser.add_argument("--output", help="file for the line of JSON")
    return parser


def _prompts(tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    return [_encode(tokenizer, topic) for topic in _TOPICS[:count]]


def _encode(tokenizer: PreTrainedTokenizerBase, topic: str) -> list[int]:
    messages = [{"role": "user", "content": f"Write one sentence that reviews a film about {topic}."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return cast(list[int], ids)
