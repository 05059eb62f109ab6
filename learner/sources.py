"""What is published of a policy, tensor by tensor, and how it is cut into buckets.

Worked example with buckets of 100 bytes and tensors of 60, 30, 250 and 20 bytes: [60, 30], [100 of 250], [100 of 250],
[50 of 250, 20].  So no bucket is larger, whatever the model, and two of them bound what sender and receivers hold.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from actors.buckets import TensorEntry, dtype_name, layout
from learner.model import ADAPTER


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """Where one published tensor comes from."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    """What must be whole to compute it; the first one gives dtype and shape."""
    adapted: nn.Module | None
    """The LoRA layer whose update is added."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the published tensor, also while the parameter is sharded."""
        weight = self.parameters[0]
        return tuple(getattr(weight, "ds_shape", weight.shape))

    @property
    def numel(self) -> int:
        """Elements of the published tensor."""
        weight = self.parameters[0]
        return int(getattr(weight, "ds_numel", weight.numel()))

    @property
    def num_bytes(self) -> int:
        """Size of the published tensor."""
        return self.numel * self.parameters[0].element_size()

    @property
    def shard(self) -> torch.Tensor | None:
        """This rank's part of the flattened tensor, None where every rank has all of it or it must be computed."""
        shard = getattr(self.parameters[0], "ds_tensor", None) if self.adapted is None else None
        return None if shard is None else shard.detach().view(-1)

    def tensor(self) -> torch.Tensor:
        """Return the published tensor; inside the engine's `gathered`."""
        weight = self.parameters[0].detach()
        if self.adapted is None:
            return weight
        update = self.adapted.get_delta_weight(ADAPTER)  # type: ignore[operator]
        return (weight.float() + update.detach().float()).to(weight.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """What one entry of a bucket is made of."""

    source: Source
    entry: TensorEntry
    offset: int  # bytes, in the bucket


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BucketPlan:
    """One bucket before it is filled."""

    pieces: tuple[Piece, ...]
    num_bytes: int

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """What is in it, without fingerprints."""
        return tuple(piece.entry for piece in self.pieces)


def sources(policy: PreTrainedModel) -> list[Source]:
    """List what is published, in the model's order: tied weights once, adapters merged."""
    modules = dict(policy.named_modules())
    found = []
    for name, parameter in policy.named_parameters():  # tied weights come once
        owner, _, leaf = name.rpartition(".base_layer.")
        layer = modules[owner] if owner else None
        if ".lora_A." in name or ".lora_B." in name:
            continue
        if layer is None or leaf != "weight":
            found.append(Source(name=name.replace(".base_layer.", "."), parameters=(parameter,), adapted=None))
            continue
        adapters = tuple(getattr(layer, part)[ADAPTER].weight for part in ("lora_A", "lora_B"))
        found.append(Source(name=f"{owner}.weight", parameters=(parameter, *adapters), adapted=layer))
    return found


def runs(listed: Sequence[Source], max_bytes: int) -> list[list[Source]]:
    """Group whole tensors to runs of up to so many bytes; a larger one is a run of its own."""
    found: list[list[Source]] = []
    used = max_bytes
    for source in listed:
        if used + source.num_bytes > max_bytes:
            found.append([])
            used = 0
        found[-1].append(source)
        used += source.num_bytes
    return found


def plan_buckets(listed: Sequence[Source], max_bytes: int) -> list[BucketPlan]:
    """Cut tensors into buckets of at most `max_bytes`, a multiple of 64; see the module's example."""
    buckets: list[list[tuple[Source, TensorEntry]]] = []
    used = max_bytes
    for source in listed:
        for entry in _entries(source, max_bytes):
            if used + entry.num_bytes > max_bytes:
                buckets.append([])
                used = 0
            buckets[-1].append((source, entry))
            used += layout([entry.num_bytes])[1]
    return [_bucket(bucket) for bucket in buckets]


def _entries(source: Source, max_bytes: int) -> Iterator[TensorEntry]:
    dtype = source.parameters[0].dtype
    longest = max_bytes // dtype.itemsize
    for start in range(0, max(source.numel, 1), longest):
        yield TensorEntry(
            name=source.name,
            kind="base",
            dtype=dtype_name(dtype),
            shape=source.shape,
            start=start,
            count=min(longest, source.numel - start),
            fingerprint=0,
        )


def _bucket(content: Sequence[tuple[Source, TensorEntry]]) -> BucketPlan:
    offsets, size = layout([entry.num_bytes for _, entry in content])
    pieces = (
        Piece(source=source, entry=entry, offset=offset)
        for (source, entry), offset in zip(content, offsets, strict=True)
    )
    return BucketPlan(pieces=tuple(pieces), num_bytes=size)
