"""A group as one row: the prompt once, its responses after it, each seeing the prompt and itself only.

Learner, reference policy and engine checks build their forward passes here.  Two layouts have the same meaning:

* shared: one row for any number of groups, for models that take a 4-D attention mask;
* padded: one row per sample, for all others.

A worked example, prompt `5 6`, responses `7 8` and `9`, shared:

    input_ids       5 6 7 8 9
    position_ids    0 1 2 3 2        restart after the prompt
    segments        0 0 1 1 2        0 = prompt
    states          1 2 3 | 1 4      per response: the last prompt token, then all of its own (R + 1 states)
    token_states    0 1   | 3        states that predict a token: all but each response's last
    targets         7 8   | 9        the last state is only there for its value, the bootstrap of a truncated response
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

Layout = Literal["shared", "padded"]
Tokens = Sequence[int] | np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptGroup:
    """One prompt and some responses to it, as token ids; neither may be empty."""

    prompt_ids: Tokens
    responses: Sequence[Tokens]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    """Groups laid out for one forward pass; N responses, S response tokens, K = S + N states."""

    layout: Layout
    input_ids: torch.Tensor
    """[rows, T] int64; rows is 1 when shared."""
    position_ids: torch.Tensor
    """[rows, T] int64."""
    groups: torch.Tensor
    """[rows, T] int64, which group a token belongs to; -1 is padding."""
    segments: torch.Tensor
    """[rows, T] int64, 0 in prompts, else the response's number within its group, from 1."""
    kept: torch.Tensor
    """[kept] int64, the positions of a row whose hidden states are needed; the same for all rows."""
    states: torch.Tensor
    """[K] int64, index into the flattened [rows * kept] hidden states, response by response."""
    token_states: torch.Tensor
    """[S] int64, index into the K states: those that predict a token."""
    targets: torch.Tensor
    """[S] int64, the tokens they predict."""
    lengths: tuple[int, ...]
    """Tokens of each of the N responses."""
    spans: tuple[tuple[int, ...], ...]
    """Tokens of each group's prompt and responses, in the order of a shared row."""

    def to(self, device: torch.device) -> "GroupRow":
        """Return the row on another device."""
        moved: dict[str, Any] = {
            name: getattr(self, name).to(device)
            for name in ("input_ids", "position_ids", "groups", "segments", "kept", "states", "token_states", "targets")
        }
        return replace(self, **moved)


def group_row(groups: Sequence[PromptGroup], *, layout: Layout = "shared") -> GroupRow:
    """Lay groups out for one forward pass.

    Raises:
        ValueError: if there is no group, or an empty prompt or response.
    """
    if not groups or any(not len(g.prompt_ids) or not len(g.responses) for g in groups):
        raise ValueError("a row must have at least one group, each with a prompt and a response, got an empty one")
    if any(not len(response) for group in groups for response in group.responses):
        raise ValueError("a response must have at least one token, got an empty one; quarantine such a sample")
    return _shared(groups) if layout == "shared" else _padded(groups)


def attention_mask(row: GroupRow, *, window: int | None = None) -> torch.Tensor:
    """Return which token sees which in a shared row: earlier ones of its own response and of its prompt.

    Args:
        row: a row in shared layout.
        window: sliding window in positions; a token sees itself and the `window - 1` before it.

    Returns:
        [1, 1, T, T] bool.
    """
    group, segment, position = row.groups[0], row.segments[0], row.position_ids[0]
    index = torch.arange(group.numel(), device=group.device)
    allowed = index[None, :] <= index[:, None]
    allowed &= group[None, :] == group[:, None]
    allowed &= (segment[None, :] == 0) | (segment[None, :] == segment[:, None])
    if window is not None:
        allowed &= position[:, None] - position[None, :] < window
    return allowed[None, None]


def split_responses(values: torch.Tensor, lengths: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Cut [sum(lengths), ...] into one tensor per response."""
    return torch.split(values, list(lengths))


def _shared(groups: Sequence[PromptGroup]) -> GroupRow:
    ids: list[int] = []
    positions: list[int] = []
    group_of: list[int] = []
    segment_of: list[int] = []
    states: list[int] = []  # positions within the row, made relative to `kept` below
    for number, group in enumerate(groups):
        parts = [group.prompt_ids, *group.responses]
        num_prompt = len(group.prompt_ids)
        last_prompt = len(ids) + num_prompt - 1
        for segment, part in enumerate(parts):
            if segment:
                states += [last_prompt, *range(len(ids), len(ids) + len(part))]
            first = num_prompt if segment else 0
            positions += range(first, first + len(part))
            group_of += [number] * len(part)
            segment_of += [segment] * len(part)
            ids += [int(token) for token in part]
    kept, index = torch.unique(torch.tensor(states), return_inverse=True)
    return GroupRow(
        layout="shared",
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        groups=torch.tensor([group_of]),
        segments=torch.tensor([segment_of]),
        kept=kept,
        states=index,
        token_states=_token_states(groups),
        targets=_targets(groups),
        lengths=tuple(len(response) for group in groups for response in group.responses),
        spans=tuple((len(group.prompt_ids), *map(len, group.responses)) for group in groups),
    )


def _padded(groups: Sequence[PromptGroup]) -> GroupRow:
    samples = [
        (number, segment, group.prompt_ids, response)
        for number, group in enumerate(groups)
        for segment, response in enumerate(group.responses, start=1)
    ]
    width = max(len(prompt) + len(response) for _, _, prompt, response in samples)
    first = min(len(prompt) - 1 for _, _, prompt, _ in samples)
    num_kept = width - first
    shape = (len(samples), width)
    input_ids, segments = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    group_of = torch.full(shape, -1)
    states: list[int] = []
    for row, (number, segment, prompt, response) in enumerate(samples):
        start, end = len(prompt), len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor([int(token) for token in (*prompt, *response)])
        segments[row, start:end] = segment
        group_of[row, :end] = number
        states += range(row * num_kept + start - 1 - first, row * num_kept + end - first)
    return GroupRow(
        layout="padded",
        input_ids=input_ids,
        position_ids=torch.arange(width).expand(shape).contiguous(),
        groups=group_of,
        segments=segments,
        kept=torch.arange(first, width),
        states=torch.tensor(states),
        token_states=_token_states(groups),
        targets=_targets(groups),
        lengths=tuple(len(response) for group in groups for response in group.responses),
        spans=tuple((len(group.prompt_ids), *map(len, group.responses)) for group in groups),
    )


def _targets(groups: Sequence[PromptGroup]) -> torch.Tensor:
    return torch.tensor([int(token) for group in groups for response in group.responses for token in response])


def _token_states(groups: Sequence[PromptGroup]) -> torch.Tensor:
    """Return the states before each response's last one."""
    indices: list[int] = []
    start = 0
    for response in (response for group in groups for response in group.responses):
        indices += range(start, start + len(response))
        start += len(response) + 1
    return torch.tensor(indices)
