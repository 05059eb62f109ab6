"""How much cheaper the torch engine samples than Hugging Face `generate`, in one process, in turn.

Workload: 16 chat prompts with 4 samples each at temperature 1, response lengths forced (lognormal, mean 50, at most 128
tokens), so that both sides draw the same number of tokens.  `generate` gets left-padded batches of as many sequences as
the engine has rows, and each batch runs to its longest response.  Cost is the process's CPU time, so neighbours on the
machine disturb little.  Prints a table, and last one line of JSON.

    python -m benchmarks.engine --model DIRECTORY [--output FILE]
"""

import os

os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actors.engine import Request, SamplingParams
from actors.policy import eos_ids, load_model, load_tokenizer
from actors.sampling import group_seed
from actors.torch_engine import TorchEngine
from benchmarks.machine import finish

NUM_PROMPTS, NUM_SAMPLES, MEAN_LENGTH, MAX_LENGTH = 16, 4, 50.0, 128
SIGMA = 0.9
"""Spread of the lognormal lengths: about five of the 64 reach the cap."""

_TOPICS = (
    "a heist", "a lonely robot", "two sisters", "the last whale", "a haunted hotel", "a jazz pianist", "a road trip",
    "a chess prodigy", "life on Mars", "a small-town mayor", "a forbidden romance", "an arctic rescue",
    "a spy who quits", "a talking dog", "the fall of Rome", "a bakery that moves into another street",
)  # fmt: skip


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    directory = arguments.model or _demo_model()
    tokenizer = load_tokenizer(directory)
    prompts = [_encode(tokenizer, topic) for topic in _TOPICS[:NUM_PROMPTS]]
    lengths = forced_lengths(NUM_PROMPTS * NUM_SAMPLES, seed=0)
    cpu = torch.device("cpu")
    plain, owned = (load_model(directory, dtype=torch.float32, device=cpu) for _ in range(2))
    _warm_up(plain, prompts)
    report: dict[str, float] = {"num_tokens": int(lengths.sum()), "threads": arguments.threads}
    for rows in arguments.rows:
        engine = TorchEngine(
            owned, tokenizer, max_rows=rows, eos_ids=eos_ids(owned, tokenizer), pack_weights=arguments.pack_weights
        )
        seconds = _in_turn(
            [partial(run_generate, plain, prompts, lengths, rows), partial(run_engine, engine, prompts, lengths)],
            repeats=arguments.repeats,
        )
        for name, spent in zip(("generate", "engine"), seconds, strict=True):
            report[f"{name}_tokens_per_cpu_s_{rows}"] = round(report["num_tokens"] / spent, 1)
            print(f"{name:9} {rows:3} rows: {report['num_tokens'] / spent:7.1f} tokens per CPU-second", flush=True)
        report[f"speedup_{rows}"] = round(seconds[0] / seconds[1], 2)
    first = arguments.rows[0]
    report["speedup_over_generate"] = report[f"speedup_{first}"]
    report["tokens_per_cpu_s"] = report[f"engine_tokens_per_cpu_s_{first}"]
    finish(report, arguments.output)


def forced_lengths(count: int, *, seed: int) -> np.ndarray:
    """Return [count] lognormal lengths, capped, whose mean is as near to `MEAN_LENGTH` as whole tokens allow."""
    shape = np.exp(SIGMA * np.random.default_rng(seed).standard_normal(count))
    low, high = 1.0, 10.0 * MEAN_LENGTH
    for _ in range(60):  # the cap bends the mean, so the scale is found by bisection
        scale = (low + high) / 2
        lengths: np.ndarray = np.clip(np.rint(scale * shape), 1, MAX_LENGTH).astype(int)
        low, high = (scale, high) if lengths.mean() < MEAN_LENGTH else (low, scale)
    return lengths


def run_generate(model: PreTrainedModel, prompts: Sequence[list[int]], lengths: np.ndarray, rows: int) -> None:
    """Sample every sequence with `generate`, `rows` at a time."""
    sequences = [prompt for prompt in prompts for _ in range(NUM_SAMPLES)]
    for start in range(0, len(sequences), rows):
        batch, longest = sequences[start : start + rows], int(lengths[start : start + rows].max())
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        output = model.generate(  # type: ignore[operator]
            ids, attention_mask=mask, do_sample=True, top_k=0, min_new_tokens=longest, max_new_tokens=longest,
            pad_token_id=0,
        )  # fmt: skip
        assert output.shape[1] == width + longest, "generate ran to the longest forced length"


def run_engine(engine: TorchEngine, prompts: Sequence[list[int]], lengths: np.ndarray) -> None:
    """Sample every sequence with the engine."""
    grouped = lengths.reshape(NUM_PROMPTS, NUM_SAMPLES)
    requests = [
        Request(
            request_id=str(index),
            prompt_ids=prompt,
            num_samples=NUM_SAMPLES,
            seed=group_seed(0, str(index)),
            sampling=SamplingParams(max_new_tokens=MAX_LENGTH),
            forced_lengths=tuple(int(length) for length in grouped[index]),
        )
        for index, prompt in enumerate(prompts)
    ]
    engine.submit(requests)
    num_tokens = 0
    while engine.has_work:
        num_tokens += sum(len(completion.response_ids) for completion in engine.step())
    assert num_tokens == lengths.sum(), "the engine drew every forced token"


def _in_turn(tasks: Sequence[Callable[[], None]], *, repeats: int) -> list[float]:
    """Return each task's median CPU-seconds, the tasks run in turn so that drifts of the machine meet all alike."""
    spent: list[list[float]] = [[] for _ in tasks]
    for _ in range(repeats):
        for task, seconds in zip(tasks, spent, strict=True):
            start = time.process_time()
            task()
            seconds.append(time.process_time() - start)
    return [statistics.median(seconds) for seconds in spent]


def _warm_up(model: PreTrainedModel, prompts: Sequence[list[int]]) -> None:
    run_generate(model, prompts[:1], np.full(NUM_SAMPLES, 4), NUM_SAMPLES)


def _encode(tokenizer: PreTrainedTokenizerBase, topic: str) -> list[int]:
    messages = [{"role": "user", "content": f"Write one sentence that reviews a film about {topic}."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return cast(list[int], ids)


def _demo_model() -> str:
    from actors.cache import cache_directory
    from examples.movie_reviews.assets import smollm2

    directory: str = smollm2(cache_directory())
    return directory


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="model directory; without it the demo's SmolLM2, fetched and converted if needed"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32], help="rows decoded together")
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many runs counts")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument(
        "--pack-weights", action=argparse.BooleanOptionalAction, default=True, help="see actors/packed_linear.py"
    )
    parser.add_argument("--output", help="file for the line of JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
