"""Samples for the report's browser: held-out answers of several policies, and what some training steps learnt from.

The page gets them as data, one JSON object; `report_browser.js` makes text of them, never markup.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.samples import readable
from cluster.storage import RunStorage

_MAX_SETS = 8
"""Of either kind; those of the first and the last step are always among them."""
MAX_SAMPLES = 256
"""Of one set, the first ones."""
_MAX_CHARACTERS = 4000
_COLUMNS = (
    "prompt_id", "prompt", "group_id", "sample_index", "response_text", "response_ids", "components", "logprobs",
    "ref_logprobs", "finish_reason",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """A file of SCORED rows."""

    name: str
    parts: tuple[str, str]
    is_held_out: bool


def browser_data(storage: RunStorage, weights: Mapping[str, float]) -> dict[str, Any] | None:
    """Return the data of the page's browser, plain; None where the run has no samples.

    `sets` are named lists of samples: `p` index of the prompt, `r` response, `n` tokens, `w` weighted sum of the
    judges' raw scores, `c` those by judge, `k` log-ratio to the reference in nats, `f` why it ended, `b` the first
    evaluated policy's answer to the same prompt under the same random numbers (absent in training sets).

    Args:
        storage: of the run.
        weights: judge -> weight in the composed score.
    """
    prompts: dict[str, int] = {}
    first: dict[tuple[str, int], str] = {}
    sets = []
    for source in _sources(storage):
        rows = storage.read_table(*source.parts).select(list(_COLUMNS)).slice(0, MAX_SAMPLES).to_pylist()
        if source.is_held_out and not first:
            first = {(row["prompt_id"], row["sample_index"]): row["response_text"] for row in rows}
        samples = [_sample(row, prompts, weights, first if source.is_held_out else {}) for row in rows]
        sets.append({"name": source.name, "samples": samples})
    return {"prompts": list(prompts), "sets": sets} if sets else None


def as_script_data(data: Mapping[str, Any]) -> str:
    """Return JSON that can stand inside a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _sources(storage: RunStorage) -> Iterator[_Source]:
    """Yield the newest evaluation last, then training steps."""
    for step in _spread(_steps(storage, "evaluation")):
        name = "held-out, before training" if step == 0 else f"held-out, after step {step}"
        yield _Source(name=name, parts=("evaluation", f"step-{step}.parquet"), is_held_out=True)
    for step in _spread(_steps(storage, "rollouts")):
        yield _Source(name=f"training, step {step}", parts=("rollouts", f"step-{step}.parquet"), is_held_out=False)


def _steps(storage: RunStorage, directory: str) -> list[int]:
    names = storage.names(directory)
    return sorted(int(found[1]) for name in names if (found := re.fullmatch(r"step-(\d+)\.parquet", name)))


def _spread(steps: Sequence[int]) -> list[int]:
    """Return at most `_MAX_SETS` of them, evenly, the first and the last included."""
    if len(steps) <= _MAX_SETS:
        return list(steps)
    return [steps[round(index)] for index in np.linspace(0, len(steps) - 1, _MAX_SETS)]


def _sample(
    row: Mapping[str, Any], prompts: dict[str, int], weights: Mapping[str, float], first: Mapping[tuple[str, int], str]
) -> dict[str, Any]:
    prompt = _clipped(readable(row["prompt"]))
    components = {name: round(float(value), 4) for name, value in row["components"]}
    sample = {
        "p": prompts.setdefault(prompt, len(prompts)),
        "r": _clipped(row["response_text"]),
        "n": len(row["response_ids"]),
        "w": round(sum(weights.get(name, 0.0) * value for name, value in components.items()), 4),
        "c": components,
        "f": row["finish_reason"],
    }
    if row["ref_logprobs"] is not None:
        sample["k"] = round(_sum(row["logprobs"]) - _sum(row["ref_logprobs"]), 3)
    before = first.get((row["prompt_id"], row["sample_index"]))
    if before is not None:
        sample["b"] = _clipped(before)
    return sample


def _sum(values: Iterable[float]) -> float:
    return float(sum(values))


def _clipped(text: str) -> str:
    if len(text) <= _MAX_CHARACTERS:
        return text
    return f"{text[:_MAX_CHARACTERS]}… ({len(text) - _MAX_CHARACTERS:,} more characters)"
