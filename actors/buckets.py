"""The bytes of one bucket: tensors one after another, or only what changed in them.

A bucket of changes holds the elements whose bits differ from the version before, exact whatever the dtype.  Worked
example, a bucket of 64 float32 elements (256 bytes) of which 2 and 60 changed: two positions as int32 and two values,
16 bytes.  With 10 changed, one bit for each element is shorter than ten positions: 8 bytes, and 10 values make 48.
Positions count elements of the bucket, the gaps between its tensors included; where elements differ in size, they count
pieces of the smallest size.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from actors.fingerprints import fingerprint

_ALIGNMENT_BYTES = 64


class WeightError(RuntimeError):
    """Received weights are not what was announced or expected; the message names the tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor inside a bucket, or some of its elements where it is larger than a bucket.

    Entries lie one after another, each starting at a multiple of 64 bytes.
    """

    name: str  # canonical Hugging Face name; tied tensors appear once, the value head never
    kind: Literal["base", "adapter"]
    dtype: str  # torch dtype name, e.g. "float32"
    shape: tuple[int, ...]  # of the whole tensor
    start: int  # first element, of the flattened tensor
    count: int  # elements
    fingerprint: int  # of their bytes, see `actors/fingerprints.py`; 0 in a plan

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.torch_dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements."""
        return self.count * self.itemsize

    @property
    def is_whole(self) -> bool:
        """Whether these are all elements of the tensor."""
        return self.start == 0 and self.count == math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise WeightError(f"the dtype of tensor {self.name!r} must be a torch dtype, got {self.dtype!r}")
        return dtype


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """Some elements of a tensor that travels in parts."""

    start: int  # first element, of the flattened tensor
    values: Tensor  # [count]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Changes:
    """Elements of a tensor, or of a part of it, that differ from the version before; the others stay."""

    entry: TensorEntry  # its fingerprint is that of the result
    word: int  # bytes that a position counts
    positions: np.ndarray  # [n] counted from the entry's first byte
    values: np.ndarray  # [n] words


Raw = np.ndarray | Tensor
"""The bytes of a bucket, [N] uint8; a tensor may be on a device."""

Load = Tensor | Part | Changes
"""What an engine takes for a name: a whole tensor, or one part of it after the other."""


def dtype_name(dtype: torch.dtype | np.dtype) -> str:
    """Return e.g. "float32"."""
    return str(dtype).removeprefix("torch.")


def layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return each entry's offset and the buffer's size, e.g. sizes 4, 100 -> offsets 0, 64 and 192 bytes."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return offsets, end


def unpack_bucket(buffer: Raw, entries: Sequence[TensorEntry]) -> list[tuple[str, Load]]:
    """Return the tensors of a buffer, which they share, after checking its size and every fingerprint.

    Raises:
        WeightError: naming the tensor whose bytes are not the announced ones.
    """
    offsets, size = layout([entry.num_bytes for entry in entries])
    if dtype_name(buffer.dtype) != "uint8" or tuple(buffer.shape) != (size,):
        raise WeightError(
            f"a bucket must be {size} bytes of uint8, got {tuple(buffer.shape)} of {dtype_name(buffer.dtype)} "
            f"({entries[0].name if entries else 'empty'}, ...); publish the version again"
        )
    whole = buffer if isinstance(buffer, Tensor) else _bytes_tensor(buffer)
    named: list[tuple[str, Load]] = []
    for entry, offset in zip(entries, offsets, strict=True):
        raw = whole[offset : offset + entry.num_bytes]
        check_fingerprint(entry, raw)
        values = raw.view(entry.torch_dtype)
        named.append(
            (entry.name, values.view(entry.shape) if entry.is_whole else Part(start=entry.start, values=values))
        )
    return named


def word_size(entries: Sequence[TensorEntry]) -> int:
    """Return the bytes that a position counts: those of the smallest element."""
    return min(entry.itemsize for entry in entries)


def changes_bytes(num_changed: int, num_words: int, word: int) -> int:
    """Return what so many changes in a bucket take."""
    return _positions_bytes(num_changed, num_words) + num_changed * word


def pack_changes(positions: np.ndarray, values: np.ndarray, num_words: int, out: np.ndarray) -> int:
    """Write changes into a buffer.

    Args:
        positions: [n], growing.
        values: [n] words.
        num_words: of the bucket.
        out: uint8, large enough.

    Returns:
        The bytes written.
    """
    split = _positions_bytes(positions.size, num_words)
    if split == 4 * positions.size:
        out[:split].view(np.int32)[:] = positions
    else:
        marks = np.zeros(num_words, dtype=bool)
        marks[positions] = True
        out[:split] = np.packbits(marks)
    raw = values.view(np.uint8)
    out[split : split + raw.size] = raw
    return split + raw.size


def unpack_changes(buffer: Raw, entries: Sequence[TensorEntry], num_changed: int) -> list[tuple[str, Load]]:
    """Return what changed in each entry, also where nothing did; the results are checked when they are there.

    Args:
        buffer: in main memory.
        entries: of the complete bucket.
        num_changed: words.

    Raises:
        WeightError: when the buffer does not have the announced size.
    """
    buffer = buffer.numpy() if isinstance(buffer, Tensor) else buffer
    word = word_size(entries)
    offsets, size = layout([entry.num_bytes for entry in entries])
    split = _positions_bytes(num_changed, size // word)
    if buffer.dtype != np.uint8 or buffer.shape != (split + num_changed * word,):
        raise WeightError(
            f"{num_changed} changes must be {split + num_changed * word} bytes of uint8, got {buffer.shape} of "
            f"{buffer.dtype} ({entries[0].name}, ...); publish the version again"
        )
    marks = None if split == 4 * num_changed else np.unpackbits(buffer[:split], count=size // word)
    positions: np.ndarray = buffer[:split].view(np.int32) if marks is None else np.flatnonzero(marks)
    values = buffer[split:].view(f"u{word}")
    first = [offset // word for offset in offsets]
    bounds = np.searchsorted(positions, [*first, size // word])
    return [
        (
            entry.name,
            Changes(entry=entry, word=word, positions=positions[start:stop] - begin, values=values[start:stop]),
        )
        for entry, begin, start, stop in zip(entries, first, bounds[:-1], bounds[1:], strict=True)
    ]


def _positions_bytes(num_changed: int, num_words: int) -> int:
    """Return the bytes of a bucket's positions: int32 each, or one bit for each word, whichever is less."""
    return min(4 * num_changed, -(-num_words // 8))


def check_fingerprint(entry: TensorEntry, raw: Raw) -> None:
    """Compare the bytes of an entry with what was announced.

    Raises:
        WeightError: naming the tensor.
    """
    found = fingerprint(raw)
    if found != entry.fingerprint:
        raise WeightError(
            f"the bytes of tensor {entry.name!r} must have fingerprint {entry.fingerprint:016x}, got {found:016x}; "
            "publish the version again"
        )


def _bytes_tensor(raw: np.ndarray) -> Tensor:
    """Return bytes as a tensor that shares them; nobody writes to it."""
    if raw.flags.writeable or raw.size == 0:
        return torch.from_numpy(raw) if raw.flags.writeable else torch.empty(0, dtype=torch.uint8)
    # torch warns about read-only memory such as an object store's, and has no read-only tensors: it gets an address.
    borrowed = (ctypes.c_ubyte * raw.size).from_address(raw.ctypes.data)
    borrowed.owner = raw  # type: ignore[attr-defined]  # the memory lives as long as the tensor
    return torch.frombuffer(borrowed, dtype=torch.uint8)
