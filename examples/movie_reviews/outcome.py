"""What the demo changed, measured on held-out prompts: the same prompts and random numbers before and after.

VADER's lexicon, which the reward model never saw, checks that the gain is not only the reward model's opinion.
"""

import json
import os
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUM_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Held-out figures of the first and last policy, as (before, after) pairs."""

    num_prompts: int
    sentiment: tuple[float, float]
    """Mean raw reward-model component."""
    gain: tuple[float, float, float]
    """Rise of that mean in standard deviations of the samples before: estimate and 95% interval (paired bootstrap by
    prompt)."""
    vader: tuple[float, float]
    """Mean compound score, -1 to 1."""
    ended: tuple[float, float]
    """Share of responses that end by themselves."""
    topic: tuple[float, float]
    """Share of responses that name their topic."""
    length: tuple[float, float]
    """Mean response tokens."""
    distinct_2: tuple[float, float]
    """Share of distinct word pairs among all word pairs."""
    kl: float
    """KL to the start at the end, nats per sequence."""
    pairs: tuple[tuple[str, str, str], ...]
    """Three (prompt, before, after)."""


def outcome(run_dir: str) -> Outcome:
    """Compare the first and the last evaluation of a run."""
    folder = os.path.join(run_dir, "evaluation")
    steps = sorted(int(name.removeprefix("step-").removesuffix(".parquet")) for name in os.listdir(folder))
    order = [("prompt_id", "ascending"), ("sample_index", "ascending")]
    before, after = (
        pq.read_table(os.path.join(folder, f"step-{step}.parquet")).sort_by(order) for step in (steps[0], steps[-1])
    )
    metrics = pq.read_table(os.path.join(run_dir, "metrics.parquet"))
    kl = metrics["eval_kl"].drop_null()[-1].as_py()
    tables = (before, after)
    return Outcome(
        num_prompts=len(set(before["prompt_id"].to_pylist())),
        sentiment=_both(tables, lambda table: _component(table, "sentiment").mean()),
        gain=_gain(before, after),
        vader=_both(tables, lambda table: _component(table, "vader").mean()),
        ended=_both(tables, lambda table: np.mean([reason == "eos" for reason in table["finish_reason"].to_pylist()])),
        topic=_both(tables, lambda table: _component(table, "topic").mean()),
        length=_both(tables, lambda table: np.mean([len(ids) for ids in table["response_ids"].to_pylist()])),
        distinct_2=_both(tables, _distinct_2),
        kl=kl,
        pairs=_pairs(before, after),
    )


def render(result: Outcome) -> str:
    """Return the outcome as text for the terminal."""
    estimate, low, high = result.gain
    rows = [
        ("reward model (raw)", *result.sentiment),
        ("VADER compound", *result.vader),
        ("ends by itself", *result.ended),
        ("names its topic", *result.topic),
        ("tokens", *result.length),
        ("distinct-2", *result.distinct_2),
    ]
    lines = [f"{result.num_prompts} held-out prompts{'before':>17}{'after':>10}"]
    lines += [f"  {name:28}{before:>10.3f}{after:>10.3f}" for name, before, after in rows]
    lines.append(
        f"  reward gain {estimate:+.2f} standard deviations of the start's samples, 95% [{low:+.2f}, {high:+.2f}]"
    )
    lines.append(f"  KL to the start {result.kl:.1f} nats per response\n")
    for prompt, before, after in result.pairs:
        lines.append(f"{prompt}\n  before: {before}\n  after:  {after}")
    return "\n".join(lines)


def _both(tables: tuple[pa.Table, pa.Table], measure: object) -> tuple[float, float]:
    first, second = (float(measure(table)) for table in tables)  # type: ignore[operator]
    return first, second


def _component(table: pa.Table, name: str) -> np.ndarray:
    return np.array([dict(components)[name] for components in table["components"].to_pylist()])


def _distinct_2(table: pa.Table) -> float:
    words = [text.lower().split() for text in table["response_text"].to_pylist()]
    pairs = [pair for text in words for pair in pairwise(text)]
    return len(set(pairs)) / max(1, len(pairs))


def _gain(before: pa.Table, after: pa.Table) -> tuple[float, float, float]:
    old, new = _component(before, "sentiment"), _component(after, "sentiment")
    prompts = np.array(before["prompt_id"].to_pylist())
    names = np.unique(prompts)
    rise = np.array([new[prompts == name].mean() - old[prompts == name].mean() for name in names]) / old.std(ddof=1)
    draws = np.random.default_rng(0).integers(len(names), size=(NUM_RESAMPLES, len(names)))
    low, high = np.percentile(rise[draws].mean(axis=1), [2.5, 97.5])
    return float(rise.mean()), float(low), float(high)


def _pairs(before: pa.Table, after: pa.Table) -> tuple[tuple[str, str, str], ...]:
    firsts = [row for row, index in enumerate(before["sample_index"].to_pylist()) if index == 0]
    chosen = firsts[:: max(1, len(firsts) // 3)][:3]
    return tuple((_question(before["prompt"][row].as_py()), _line(before, row), _line(after, row)) for row in chosen)


def _question(prompt: str) -> str:
    return prompt if not prompt.startswith("[") else str(json.loads(prompt)[-1]["content"])


def _line(table: pa.Table, row: int) -> str:
    # Text of a model goes to a terminal: control characters must not.
    text = " ".join(table["response_text"][row].as_py().split())
    return "".join(character if character.isprintable() else "?" for character in text)
