"""What each rank holds of the published tensors, and how it comes to the first rank.

A rank's share of a tensor is a run of its flattened elements.  Where ZeRO shards parameters it is the shard, which goes
straight to its place in the first rank's bucket: no rank gathers a whole tensor, only those that are computed
(adapters merged) are made whole.  Where every rank has everything, shares matter only for finding changes.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from learner.optimizer import OptimizerEngine
from learner.process_group import sends_from_cpu
from learner.sources import BucketPlan, Piece, Source


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Share:
    """A rank's bytes of one piece of a bucket."""

    piece: Piece
    at: int  # byte of the piece at which they start
    raw: np.ndarray  # uint8


class Shares:
    """Fills buckets; every method is called on all ranks together."""

    def __init__(self, engine: OptimizerEngine) -> None:
        self.rank, self.world_size = engine.rank, engine.world_size
        self.is_direct = engine.world_size == 1 or sends_from_cpu()
        """Whether ranks can send parts of buckets, which lie in host memory."""
        self._engine = engine

    def fill(self, plan: BucketPlan, out: torch.Tensor) -> None:
        """Write a bucket's tensors into `out`, [num_bytes] uint8, on the first rank; it is not used on others.

        It may be on a device where no rank sends parts of buckets to another.
        """
        transfers: list[Any] = []
        with self._whole(plan):
            for piece in plan.pieces:
                shard = self._shard(piece.source)
                target = out[piece.offset : piece.offset + piece.entry.num_bytes] if self.rank == 0 else None
                if shard is not None:
                    transfers += self._collect(piece, shard, target)
                elif target is not None:
                    start = piece.entry.start
                    _copy(piece.source.tensor().reshape(-1)[start : start + piece.entry.count], target)
        for transfer in transfers:
            transfer.wait()

    def mine(self, plan: BucketPlan) -> Iterator[Share]:
        """Yield this rank's share of every piece, some of them empty; valid until the next one is asked for."""
        with self._whole(plan):
            for piece in plan.pieces:
                shard, entry = self._shard(piece.source), piece.entry
                size = -(-piece.source.numel // self.world_size) if shard is None else shard.numel()
                start, stop = self._bounds(piece, size, self.rank)
                if shard is None:
                    elements = piece.source.tensor().reshape(-1)[start:stop]
                else:
                    elements = shard[start - self.rank * size : stop - self.rank * size]
                raw = elements.contiguous().view(torch.uint8).cpu().numpy()
                yield Share(piece=piece, at=(start - entry.start) * entry.itemsize, raw=raw)

    def _whole(self, plan: BucketPlan) -> Any:
        """Return a context in which the tensors that are not taken shard by shard are whole."""
        parameters = [p for piece in plan.pieces if self._shard(piece.source) is None for p in piece.source.parameters]
        return self._engine.gathered(parameters) if parameters else nullcontext()

    def _shard(self, source: Source) -> torch.Tensor | None:
        return source.shard if self.is_direct else None

    def _collect(self, piece: Piece, shard: torch.Tensor, target: torch.Tensor | None) -> list[Any]:
        """Bring all ranks' parts of a piece to the first rank; return what to wait for."""
        size, entry = shard.numel(), piece.entry
        if target is None:
            start, stop = self._bounds(piece, size, self.rank)
            if start == stop:
                return []
            part = shard[start - self.rank * size : stop - self.rank * size]
            return [dist.isend(part.cpu().view(torch.uint8), 0)]
        transfers = []
        for rank in range(self.world_size):
            start, stop = self._bounds(piece, size, rank)
            place = target[(start - entry.start) * entry.itemsize : (stop - entry.start) * entry.itemsize]
            if rank == 0:
                _copy(shard[start:stop], place)
            elif start < stop:
                transfers.append(dist.irecv(place, rank))
        return transfers

    @staticmethod
    def _bounds(piece: Piece, size: int, rank: int) -> tuple[int, int]:
        """Return which elements of the tensor are in the piece and in a rank's share of `size`."""
        first, last = piece.entry.start, piece.entry.start + piece.entry.count
        start = min(max(first, rank * size), last)
        return start, max(start, min(last, (rank + 1) * size))


def _copy(elements: torch.Tensor, target: torch.Tensor) -> None:
    if elements.numel():
        target.view(elements.dtype).copy_(elements.detach())
