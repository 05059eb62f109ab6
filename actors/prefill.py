"""What a prompt leaves behind before its first token is drawn: keys, values and the outputs after its last token."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from actors.live_rows import Outputs
from actors.slots import CHUNK, WINDOW_MULTIPLE, Continuation, Prefix, SlotContext, round_up

ROW_MULTIPLE = 4
"""Rows of a product.  Products of fewer than four take other code paths in the maths library, with other bits; and the
last elements of a tensor whose size is not a multiple of 32 are computed one by one instead of as vectors, so that exp,
cos and the like have other bits there.  Four rows of any width that is a multiple of 8 leave no such rest."""

Prefilled = tuple[Prefix, Outputs]
"""Keys and values of one sequence, and its outputs, [1, ...]."""

Forward = Callable[[Tensor, Tensor, int | Tensor, SlotContext], Outputs]
"""`forward(ids [B, T], positions [B, T], kept, context) -> outputs [B, kept, ...]`."""


class Prefiller:
    """Runs prompts through the model.

    A worked example: a prompt of 100 tokens follows one of 90 that has the same first 70.  The first 64 of them, two
    whole chunks, are taken from it, and 36 are computed.

    Args:
        forward: of the model.
        device: of the model.
        max_positions: positions the model has an embedding for.
    """

    def __init__(self, forward: Forward, device: torch.device, *, max_positions: int) -> None:
        self._forward = forward
        self._device = device
        self._max_positions = max_positions
        self._latest: tuple[Sequence[int], Prefix] | None = None
        self.num_tokens = 0
        """Computed so far, without padding."""

    def forget(self) -> None:
        """Take nothing from what has been computed until now."""
        self._latest = None

    def alone(self, tokens: Sequence[int]) -> Prefilled:
        """Run one sequence alone, so that its bits are the same in any company and after any other."""
        known, before = self._known(tokens)
        rest = tokens[known:]
        ids = torch.zeros(1, round_up(len(rest), WINDOW_MULTIPLE), dtype=torch.long)
        ids[0, : len(rest)] = torch.as_tensor(rest)
        context = Continuation(known=known, before=before)
        last = torch.full((ROW_MULTIPLE,), len(rest) - 1, device=self._device)
        outputs = self._forward(ids, self._positions(ids, known), last, context)
        prefix = Prefix(length=len(tokens), keys=context.keys, values=context.values)
        self._latest = (tuple(tokens), prefix)
        self.num_tokens += len(rest)
        return prefix, outputs[0, :1]

    def together(self, sequences: Sequence[Sequence[int]]) -> list[Prefilled]:
        """Run sequences as one batch, padded at the right: a GPU's time goes with the number of passes."""
        lengths = [len(tokens) for tokens in sequences]
        ids = torch.zeros(len(sequences), round_up(max(lengths), WINDOW_MULTIPLE), dtype=torch.long)
        for row, tokens in zip(ids, sequences, strict=True):
            row[: len(tokens)] = torch.as_tensor(tokens)
        all_of_them = Prefix(length=max(lengths))
        kept = sorted({length - 1 for length in lengths})
        outputs = self._forward(ids, self._positions(ids), torch.tensor(kept, device=self._device), all_of_them)
        prefilled = []
        for row, length in enumerate(lengths):
            # copies: a view would hold the whole batch until the last of its prompts has started
            keys = [key[row : row + 1, :, :length].clone() for key in all_of_them.keys]
            values = [value[row : row + 1, :, :length].clone() for value in all_of_them.values]
            place = kept.index(length - 1)
            prefilled.append((Prefix(length=length, keys=keys, values=values), outputs[row, place : place + 1]))
        self.num_tokens += sum(lengths)
        return prefilled

    def _known(self, tokens: Sequence[int]) -> tuple[int, Prefix | None]:
        """Return how many tokens the latest sequence has already, in whole chunks and not all, and its prefix."""
        if self._latest is None:
            return 0, None
        others, prefix = self._latest
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tokens[:-1], others, strict=False))
        known = sum(1 for _ in shared) // CHUNK * CHUNK
        return (known, prefix) if known else (0, None)

    def _positions(self, ids: Tensor, first: int = 0) -> Tensor:
        # Padding may reach past the last position the model has an embedding for.
        return torch.arange(first, first + ids.shape[1]).clamp(max=self._max_positions - 1).expand(ids.shape)
