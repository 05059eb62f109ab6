"""Decoder judges read a group's texts as rows that hold once what the texts begin with.

Worked example, 10 tokens of question, answers of 6, 2 and 4 tokens, and a text that was cut off at its beginning:

    texts       q1..q10 a1..a6 | q1..q10 b1 b2 | q1..q10 c1..c4 | q7..q10 d1..d9
    one row     q1..q10 a1..a6 b1 b2 c1..c4        22 tokens for 42; `actors.rows` has positions and mask
    alone       q7..q10 d1..d9                     begins differently, so it is read as its own padded row

Which texts share a row follows from a group's texts alone, and so do the bits of their scores.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from transformers import PreTrainedModel

from actors.rows import Layout, PromptGroup, group_row
from actors.scorer import PROBE_SEED, REFUSALS, is_close, model_mask

logger = logging.getLogger(__name__)

Texts = Sequence[Sequence[int]]
"""Token ids of some texts, none empty."""

_MIN_PREFIX = 8
"""Tokens that texts must begin with alike to share a row."""
_MIN_OWN_TOKENS = 512
"""Behind what they share, a row's texts may have so many tokens however little they share: short rows starve a GPU."""
_MAX_ROW_TOKENS = 4096
"""The mask has the square of a row's tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRow:
    """Texts of a group that are read together."""

    indices: tuple[int, ...]
    """Which of the group's texts they are."""
    prefix: Sequence[int]
    """What they all begin with, at least one token."""
    rests: Texts
    """What each goes on with, at least one token."""

    def last_states(self, trunk: PreTrainedModel) -> torch.Tensor:
        """Return the state of each text's last token, [N, H]."""
        row = group_row([PromptGroup(prompt_ids=self.prefix, responses=self.rests)]).to(trunk.device)
        output = trunk(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            attention_mask=model_mask(row, trunk),
            use_cache=False,
        )
        ends = torch.tensor(row.lengths, device=trunk.device).add(1).cumsum(0) - 1  # a response's states end with it
        states: torch.Tensor = output.last_hidden_state[0, row.kept[row.states[ends]]]
        return states


def shared_rows(texts: Texts, *, hidden_size: int) -> tuple[list[SharedRow], list[int]]:
    """Return rows for texts that begin alike, and the indices of those that are read alone, in order."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, text in enumerate(texts):
        alike.setdefault(tuple(text[:_MIN_PREFIX]), []).append(index)
    rows = [row for indices in alike.values() for row in _rows(texts, indices, hidden_size)]
    shared = {index for row in rows for index in row.indices}
    return rows, [index for index in range(len(texts)) if index not in shared]


def own_tokens(num_shared: int, *, hidden_size: int) -> int:
    """Return how many tokens a row should have behind the P = `num_shared` that its texts share.

    A row of P + x tokens costs (P + x) + (P + x)^2 / A, see `_cost`; for each of the x that is least at
    x = sqrt(P (P + A)).
    """
    cheapest = math.isqrt(num_shared * (num_shared + _attention_tokens(hidden_size)))
    return min(max(cheapest, _MIN_OWN_TOKENS), _MAX_ROW_TOKENS - num_shared)


def layout_of(trunk: PreTrainedModel, padded_states: Callable[[Texts], torch.Tensor]) -> Layout:
    """Return whether texts in one row have the states that they have alone.

    Args:
        trunk: the decoder, in eval mode.
        padded_states: reads each text as its own row and returns its last token's state, [N, H].
    """
    texts = _probe_texts(trunk)
    row = SharedRow(indices=(0, 1, 2), prefix=texts[0][:_MIN_PREFIX], rests=[text[_MIN_PREFIX:] for text in texts])
    expected = padded_states(texts)
    try:
        found = row.last_states(trunk)
    except REFUSALS as error:
        logger.info("%s takes no 4-D mask (%s); a row holds one text", type(trunk).__name__, error)
        return "padded"
    if is_close(found, expected, trunk.dtype):
        return "shared"
    logger.info("%s does not follow a 4-D mask; a row holds one text", type(trunk).__name__)
    return "padded"


def _rows(texts: Texts, indices: Sequence[int], hidden_size: int) -> list[SharedRow]:
    """Return rows of texts that begin alike, none where reading each alone costs less."""
    alike = [texts[index] for index in indices]
    num_shared = _num_common(alike)
    if num_shared == 0:
        return []
    rests = [text[num_shared:] for text in alike]
    parts = _split([len(rest) for rest in rests], own_tokens(num_shared, hidden_size=hidden_size))
    shared = sum(_cost(num_shared + sum(len(rests[i]) for i in part), hidden_size) for part in parts)
    if shared >= len(alike) * _cost(max(map(len, alike)), hidden_size):  # padded to the longest
        return []
    prefix = alike[0][:num_shared]
    return [
        SharedRow(indices=tuple(indices[i] for i in part), prefix=prefix, rests=[rests[i] for i in part])
        for part in parts
    ]


def _attention_tokens(hidden_size: int) -> int:
    """Return about how long a row is whose attention, dense though masked, costs as much as all other layers."""
    return 4 * hidden_size


def _cost(num_tokens: int, hidden_size: int) -> float:
    """Return what reading a row of so many tokens costs, in tokens without attention."""
    return num_tokens + num_tokens**2 / _attention_tokens(hidden_size)


def _num_common(texts: Texts) -> int:
    """Return how many tokens all texts begin with, leaving each at least one of its own."""
    columns = zip(*(text[:-1] for text in texts), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _split(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut texts, in order, into runs of at most `budget` tokens; a longer one stays alone."""
    parts: list[list[int]] = []
    used = 0
    for index, length in enumerate(lengths):
        if not parts or used + length > budget:
            parts.append([])
            used = 0
        parts[-1].append(index)
        used += length
    return parts


def _probe_texts(trunk: PreTrainedModel) -> list[list[int]]:
    """Return three texts of random tokens that begin alike, long enough that positions and masks matter."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    tokens: list[int] = torch.randint(
        trunk.config.get_text_config().vocab_size, (_MIN_PREFIX + 15,), generator=generator
    ).tolist()
    start, rest = tokens[:_MIN_PREFIX], tokens[_MIN_PREFIX:]
    return [start + rest[:4], start + rest[4:11], start + rest[11:]]
