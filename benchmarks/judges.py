"""What it saves judges and the reference policy to read a group as shared rows instead of one padded row per text.

A decoder judge and a reference policy of SmolLM2-135M's shape score groups in both layouts, in turn, in one process:

* uniform: 8 groups of 4 texts, 44 tokens of prompt and 64 of response;
* realistic: 4 groups of 8 texts, 200 tokens of prompt, response lengths lognormal with mean 50, at most 128.

A group is one call, as in a reward worker.  The tokens are random; both layouts must agree on the numbers.  Cost is the
process's CPU time, so neighbours on the machine disturb little.  Prints a table, and last one line of JSON with the
ratios padded / shared.

    python -m benchmarks.judges [--model DIRECTORY]
"""

import os

os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from actors.architecture import character_tokenizer
from actors.policy import load_model
from actors.rows import Layout
from actors.scoring import reference_logprobs, scorer_of
from benchmarks.engine_workload import spread_lengths
from benchmarks.machine import finish
from reward.model import RewardModel
from reward.reference import row_tokens

LAYOUTS: tuple[Layout, Layout] = ("padded", "shared")
SHAPE: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048, "rope_theta": 100000.0,
    "tie_word_embeddings": True, "initializer_range": 0.041666666666666664,
}  # fmt: skip
"""SmolLM2-135M's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Token ids of one prompt and its responses."""

    prompt: list[int]
    responses: list[list[int]]

    @property
    def texts(self) -> list[list[int]]:
        """What a judge reads."""
        return [self.prompt + response for response in self.responses]


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    policy = _policy(arguments.model, num_layers=arguments.layers)
    # The judge reads with the policy's own layers, to spare memory; it never reads through their head.
    judge = RewardModel(
        cast(PreTrainedModel, policy.base_model), character_tokenizer("a"), pooling="last", has_eos=False
    ).eval()
    assert judge.layout == scorer_of(policy).layout == "shared", "the model takes a group as one row"
    report: dict[str, float] = {"threads": arguments.threads, "layers": policy.config.num_hidden_layers}
    vocab_size = policy.config.vocab_size
    for workload, groups in (("uniform", uniform(vocab_size)), ("realistic", realistic(vocab_size))):
        for part, score in (("judge", partial(_judged, judge)), ("reference", partial(_logprobs, policy))):
            padded, shared = _in_turn(score, groups, repeats=arguments.repeats)
            report[f"{workload}_{part}"] = round(padded / shared, 2)
            report[f"{workload}_{part}_padded_s"], report[f"{workload}_{part}_s"] = round(padded, 3), round(shared, 3)
            print(
                f"{workload:9} {part:9}: padded {padded:7.2f} s, shared {shared:7.2f} s: {padded / shared:.2f}x",
                flush=True,
            )
    finish(report, arguments.output)


def uniform(vocab_size: int) -> list[Group]:
    """Return 8 groups of 4, 44 + 64 tokens each."""
    return _groups(np.full((8, 4), 64), num_prompt=44, vocab_size=vocab_size)


def realistic(vocab_size: int) -> list[Group]:
    """Return 4 groups of 8, 200 tokens and a lognormal number."""
    return _groups(spread_lengths(32).reshape(4, 8), num_prompt=200, vocab_size=vocab_size)


def _groups(lengths: np.ndarray, *, num_prompt: int, vocab_size: int) -> list[Group]:
    draw = np.random.default_rng(0)
    return [
        Group(
            prompt=draw.integers(vocab_size, size=num_prompt).tolist(),
            responses=[draw.integers(vocab_size, size=length).tolist() for length in row],
        )
        for row in lengths
    ]


def _judged(judge: RewardModel, groups: Sequence[Group], layout: Layout) -> np.ndarray:
    """Return the scores of all texts."""
    judge.layout = layout
    return np.concatenate([judge.score_ids(group.texts) for group in groups])


def _logprobs(policy: PreTrainedModel, groups: Sequence[Group], layout: Layout) -> np.ndarray:
    """Return the log-probs of all response tokens, in rows as a reward worker cuts them."""
    scorer_of(policy).layout = layout
    found: list[np.ndarray] = []
    for group in groups:
        size = row_tokens(policy, len(group.prompt)) if layout == "shared" else 1 << 30  # all texts in one batch
        found += reference_logprobs(policy, group.prompt, group.responses, temperature=1.0, row_tokens=size)
    return np.concatenate(found)


def _in_turn(
    score: Callable[[Sequence[Group], Layout], np.ndarray], groups: Sequence[Group], *, repeats: int
) -> list[float]:
    """Return the median CPU-seconds of each layout, run in turn so that drifts of the machine meet both alike."""
    spent: dict[Layout, list[float]] = {layout: [] for layout in LAYOUTS}
    first, second = (score(groups[:1], layout) for layout in LAYOUTS)  # warms up as well
    assert np.allclose(first, second, atol=1e-3 * np.abs(first).max()), "both layouts have the same numbers"
    for _ in range(repeats):
        for layout in LAYOUTS:
            start = time.process_time()
            score(groups, layout)
            spent[layout].append(time.process_time() - start)
    return [statistics.median(spent[layout]) for layout in LAYOUTS]


def _policy(directory: str | None, *, num_layers: int) -> PreTrainedModel:
    if directory is not None:
        return load_model(directory, dtype=torch.float32, device=torch.device("cpu"))
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE | {"num_hidden_layers": num_layers})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a decoder; without it SmolLM2-135M's shape with random weights")
    parser.add_argument("--layers", type=int, default=30, help="layers of the random model; fewer for a quick look")
    parser.add_argument("--repeats", type=int, default=3, help="the median of so many runs counts")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--output", help="file that keeps the line of JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
