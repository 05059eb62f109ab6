"""What has changed since the weights that were sent last: each rank keeps its share of them and compares it.

The bits are compared, so the result is exact in any dtype.  What one rank keeps is one share of the model in the dtype
that is published; an element counts as changed when any of its bits has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from actors.buckets import changes_bytes, pack_changes, word_size
from actors.fingerprints import fingerprint
from learner.optimizer import OptimizerEngine
from learner.shares import Shares
from learner.sources import BucketPlan

_LARGEST_SHARE = 0.5
"""Of a complete bucket's bytes: where changes take more, putting them in their places takes longer than more bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A bucket that has been written into a buffer."""

    num_bytes: int
    num_changed: int | None
    """None = complete, because too much has changed."""
    fingerprints: list[int]
    """Of each entry's complete bytes."""


class DeltaPacker:
    """Writes buckets of changes; every method is called on all ranks together, bucket after bucket.

    Args:
        engine: of these ranks.
        shares: what they hold.
        plans: all buckets.
    """

    def __init__(self, engine: OptimizerEngine, shares: Shares, plans: Sequence[BucketPlan]) -> None:
        self._engine = engine
        self._shares = shares
        self._plans = plans
        self._last: dict[int, list[np.ndarray]] = {}
        self._held: tuple[int, int] | None = None

    def can_follow(self, base: int | None, incarnation: int) -> bool:
        """Whether what was sent last is this version."""
        return base is not None and self._held == (base, incarnation)

    def begin(self) -> None:
        """Say that buckets of another version come: until its end, changes to neither can be told."""
        self._held = None

    def end(self, version: int, incarnation: int) -> None:
        """Say that all buckets of a version have been sent."""
        self._held = (version, incarnation)

    def remember(self, index: int) -> None:
        """Keep this rank's share of a bucket that is sent completely."""
        kept = self._last.get(index)
        if kept is None:
            self._last[index] = [share.raw.copy() for share in self._shares.mine(self._plans[index])]
            return
        for old, share in zip(kept, self._shares.mine(self._plans[index]), strict=True):
            old[:] = share.raw

    def pack(self, index: int, out: torch.Tensor) -> Packed:
        """Write what has changed in a bucket into `out`, in main memory, on the first rank; not used on others."""
        plan = self._plans[index]
        word = word_size(plan.entries)
        num_words = plan.num_bytes // word
        positions, values, found = self._compare(index, word)
        counts = self._engine.all_gather(positions.size)
        sums = self._engine.all_reduce(torch.from_numpy(found.view(np.int64)))  # wraps, as it must
        fingerprints = sums.numpy().view(np.uint64).tolist()
        total = sum(counts)
        if changes_bytes(total, num_words, word) > _LARGEST_SHARE * plan.num_bytes:
            self._shares.fill(plan, out)
            return Packed(num_bytes=plan.num_bytes, num_changed=None, fingerprints=fingerprints)
        positions, values = self._collected(positions, values, counts)
        size = pack_changes(positions, values, num_words, out.numpy()) if self._shares.rank == 0 else 0
        return Packed(num_bytes=size, num_changed=total, fingerprints=fingerprints)

    def _compare(self, index: int, word: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return positions and words that changed in this rank's share, and its part of each entry's fingerprint."""
        positions, values, found = [np.zeros(0, np.int32)], [np.zeros(0, f"u{word}")], []
        for old, share in zip(self._last[index], self._shares.mine(self._plans[index]), strict=True):
            new = share.raw.view(f"u{word}")
            changed = np.flatnonzero(old.view(f"u{word}") != new)
            positions.append((changed + (share.piece.offset + share.at) // word).astype(np.int32))
            values.append(new[changed])
            found.append(fingerprint(share.raw, at=share.at))
            old[:] = share.raw
        return np.concatenate(positions), np.concatenate(values), np.array(found, dtype=np.uint64)

    def _collected(
        self, positions: np.ndarray, values: np.ndarray, counts: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return all ranks' changes, by position, on the first rank."""
        if self._shares.world_size == 1:
            return positions, values
        if self._shares.rank != 0:
            _wait([dist.isend(_raw(part), 0) for part in (positions, values) if part.size])
            return positions, values
        theirs = [(np.empty(n, np.int32), np.empty(n, values.dtype)) for n in counts[1:]]
        _wait([dist.irecv(_raw(part), rank) for rank, pair in enumerate(theirs, 1) for part in pair if part.size])
        positions = np.concatenate([positions, *(pair[0] for pair in theirs)])
        values = np.concatenate([values, *(pair[1] for pair in theirs)])
        order = np.argsort(positions)
        return positions[order], values[order]


def _raw(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.view(np.uint8))


def _wait(transfers: Sequence[Any]) -> None:
    for transfer in transfers:
        transfer.wait()
