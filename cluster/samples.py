"""Held-out responses of the first and the last policy, side by side, for the report."""

import html
from typing import Any

import pyarrow as pa

from actors.encoding import parse_prompt

_NUM_OPEN = 6
_NUM_FOLDED = 58
_MAX_CHARACTERS = 4000

Key = tuple[str, int]
"""prompt_id, sample_index."""


def render_samples(before: pa.Table | None, after: pa.Table | None) -> str:
    """Return the section's HTML: pairs with the same prompt and sample number, in the order of the file, none picked.

    Args:
        before: SCORED, responses of the first evaluated policy.
        after: SCORED, of the last one.
    """
    pairs = _pairs(before, after) if before is not None and after is not None else []
    if not pairs:
        return '<p class="note">There are not two evaluations of the same prompts to compare.</p>'
    note = "The first and the last evaluated policy on held-out prompts; the first ones in order, not picked."
    shown = [_pair(*pair) for pair in pairs[: _NUM_OPEN + _NUM_FOLDED]]
    opened, folded = shown[:_NUM_OPEN], shown[_NUM_OPEN:]
    text = f'<p class="note">{note}</p><div class="samples">{"".join(opened)}</div>'
    if folded:
        inner = f'<div class="samples">{"".join(folded)}</div>'
        text += f"<details><summary>{len(folded)} more</summary>{inner}</details>"
    return text


def _pairs(before: pa.Table, after: pa.Table) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Join on (prompt, sample number); one sample of each prompt comes first, so that few pairs show many prompts."""
    later = {_key(row): row for row in after.to_pylist()}
    pairs = [(row, later[_key(row)]) for row in before.to_pylist() if _key(row) in later]
    return sorted(pairs, key=lambda pair: pair[0]["sample_index"])


def _key(row: dict[str, Any]) -> Key:
    return row["prompt_id"], row["sample_index"]


def _pair(before: dict[str, Any], after: dict[str, Any]) -> str:
    answers = _answer("before", before) + _answer("after", after)
    prompt = html.escape(_clipped(readable(before["prompt"])))
    return f'<article class="card"><p class="prompt">{prompt}</p><div class="pair">{answers}</div></article>'


def _answer(when: str, row: dict[str, Any]) -> str:
    chips = [f"<span>{html.escape(name)} {value:.2f}</span>" for name, value in row["components"]]
    chips.append(f"<span>{len(row['response_ids'])} tokens</span>")
    if row["finish_reason"] == "length":
        chips.append('<span class="cut">cut off</span>')
    text = html.escape(_clipped(row["response_text"])) or '<span class="soft">(empty)</span>'
    return (
        f'<div class="answer"><div class="when">{when}</div><blockquote>{text}</blockquote>'
        f'<div class="chips">{"".join(chips)}</div></div>'
    )


def readable(prompt: str) -> str:
    """Return a prompt column's text for a person: chat messages with their roles, a single one without."""
    parsed = parse_prompt(prompt)
    if isinstance(parsed, str):
        return parsed
    if len(parsed) == 1:
        return parsed[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in parsed)


def _clipped(text: str) -> str:
    if len(text) <= _MAX_CHARACTERS:
        return text
    return f"{text[:_MAX_CHARACTERS]}… ({len(text) - _MAX_CHARACTERS:,} more characters)"
