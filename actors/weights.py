"""Weights on their way from the learner: what is announced, how it is checked, how a receiver takes it.

The learner packs named tensors into buckets and publishes a `Publication`; a receiver pulls bucket after bucket through
a `WeightTransport`, checks each tensor and copies it in place.  What needs Ray lives in `cluster/transport.py`.
"""

import difflib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from actors.engine import Engine

_ALIGNMENT_BYTES = 64


class WeightError(RuntimeError):
    """Received weights are not what was announced or expected; the message names the tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor inside a bucket; tensors lie one after another, each starting at a multiple of 64 bytes."""

    name: str  # canonical Hugging Face name; tied tensors appear once, the value head never
    kind: Literal["base", "adapter"]
    dtype: str  # torch dtype name, e.g. "float32"
    shape: tuple[int, ...]
    fingerprint: int  # CRC-32 of its bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A run of tensors that travels as one buffer; `handle` is the transport's."""

    entries: tuple[TensorEntry, ...]
    num_bytes: int
    handle: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """Everything a receiver needs to take one version of the policy."""

    version: int
    incarnation: int
    buckets: tuple[Bucket, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole version."""
        return sum(bucket.num_bytes for bucket in self.buckets)


class WeightTransport(Protocol):
    """Moves one buffer from the learner's rank 0 to any number of receivers, which pull when they are ready."""

    def put(self, buffer: np.ndarray) -> Any:
        """Make a uint8 buffer available; return the handle to announce."""

    def get(self, handle: Any) -> np.ndarray:
        """Return the uint8 buffer behind a handle, read-only."""


class InProcessTransport:
    """Hands buffers over inside one process: tests, and a learner that shares its process with an engine."""

    def put(self, buffer: np.ndarray) -> np.ndarray:
        """Return the buffer itself."""
        return buffer

    def get(self, handle: np.ndarray) -> np.ndarray:
        """Return the buffer itself."""
        return handle


def pack_bucket(
    named: Sequence[tuple[str, Tensor]], kind: Literal["base", "adapter"] = "base"
) -> tuple[np.ndarray, tuple[TensorEntry, ...]]:
    """Lay tensors into one buffer, each at a multiple of 64 bytes.

    Returns:
        The uint8 buffer, and what is in it.
    """
    offsets, size = _layout([tensor.numel() * tensor.element_size() for _, tensor in named])
    buffer = np.zeros(size, dtype=np.uint8)
    entries = []
    for (name, tensor), offset in zip(named, offsets, strict=True):
        # numpy has no bfloat16: the bytes travel, the dtype is a name.
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        buffer[offset : offset + raw.size] = raw
        entry = TensorEntry(
            name=name,
            kind=kind,
            dtype=_dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            fingerprint=zlib.crc32(raw.data),
        )
        entries.append(entry)
    return buffer, tuple(entries)


def unpack_bucket(buffer: np.ndarray, entries: Sequence[TensorEntry]) -> list[tuple[str, Tensor]]:
    """Return the tensors of a buffer after checking its size and every fingerprint.

    Raises:
        WeightError: naming the tensor whose bytes are not the announced ones.
    """
    offsets, size = _layout([_num_bytes(entry) for entry in entries])
    if buffer.dtype != np.uint8 or buffer.shape != (size,):
        raise WeightError(
            f"a bucket must be {size} bytes of uint8, got {buffer.shape} of {buffer.dtype} "
            f"({entries[0].name if entries else 'empty'}, ...); publish the version again"
        )
    named = []
    for entry, offset in zip(entries, offsets, strict=True):
        raw = buffer[offset : offset + _num_bytes(entry)]
        found = zlib.crc32(raw.data)
        if found != entry.fingerprint:
            raise WeightError(
                f"the bytes of tensor {entry.name!r} must have fingerprint {entry.fingerprint:08x}, got {found:08x}; "
                "publish the version again"
            )
        named.append((entry.name, _bytes_tensor(raw).view(_torch_dtype(entry)).reshape(entry.shape)))
    return named


def receive(
    publication: Publication,
    transport: WeightTransport,
    engine: "Engine",
    expected: Mapping[str, tuple[tuple[int, ...], str]] | None = None,
) -> None:
    """Bring an engine without live requests to a published version.

    The announcement is checked before a single weight changes; the bytes are checked bucket by bucket.

    Args:
        publication: what was announced.
        transport: where its buffers are.
        engine: takes the weights in place.
        expected: canonical name -> (shape, dtype name); None = what the engine says.

    Raises:
        WeightError: naming the tensor that is missing, unknown, or of another shape, dtype or fingerprint.
    """
    _check_announcement(publication, engine.weight_shapes() if expected is None else expected)
    engine.begin_update(publication.version, "drain")
    for bucket in publication.buckets:
        engine.load(unpack_bucket(transport.get(bucket.handle), bucket.entries))
    engine.end_update()


class InPlaceWeights:
    """A module's parameters as the target of an update: copied in place, by canonical name, each exactly once.

    In place, because captured graphs and tied parameters hold on to the memory.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = dict(module.named_parameters())  # names tied parameters once
        self._missing: set[str] = set()

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return canonical name -> (shape, dtype name)."""
        return {name: (tuple(p.shape), _dtype_name(p.dtype)) for name, p in self._parameters.items()}

    def begin(self) -> None:
        """Expect every parameter again."""
        self._missing = set(self._parameters)

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy named tensors.

        Raises:
            WeightError: on a name the module does not have, a name that came already, or another shape.
        """
        for name, tensor in tensors:
            if name not in self._parameters:
                raise WeightError(_unknown(name, self._parameters))
            if name not in self._missing:
                raise WeightError(f"tensor {name!r} must come once in an update that has begun; begin the update again")
            parameter = self._parameters[name]
            if parameter.shape != tensor.shape:
                raise WeightError(
                    f"tensor {name!r} must have shape {tuple(parameter.shape)}, got {tuple(tensor.shape)}; "
                    "learner and engine must run the same architecture"
                )
            parameter.copy_(tensor)
            self._missing.discard(name)

    def end(self) -> None:
        """Check that every parameter came.

        Raises:
            WeightError: naming those that did not.
        """
        if self._missing:
            raise WeightError(f"an update must bring every tensor, missing {_some(self._missing)}; publish it again")


def _check_announcement(publication: Publication, expected: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    announced: dict[str, TensorEntry] = {}
    for entry in (entry for bucket in publication.buckets for entry in bucket.entries):
        if entry.kind != "base":
            raise WeightError(
                f"tensor {entry.name!r} must be of kind 'base', got {entry.kind!r}; publish merged weights"
            )
        if entry.name in announced:
            raise WeightError(f"tensor {entry.name!r} must be announced once, got it twice; publish tied tensors once")
        announced[entry.name] = entry
        if entry.name not in expected:
            raise WeightError(_unknown(entry.name, expected))
        if (entry.shape, entry.dtype) != expected[entry.name]:
            shape, dtype = expected[entry.name]
            raise WeightError(
                f"tensor {entry.name!r} must be {dtype} {shape}, got {entry.dtype} {entry.shape}; "
                "learner and engine must run the same architecture and publish the engine's dtype"
            )
    missing = set(expected) - set(announced)
    if missing:
        raise WeightError(f"version {publication.version} must bring every tensor, missing {_some(missing)}")


def _layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return each tensor's offset and the buffer's size, e.g. sizes 4, 100 -> offsets 0, 64 and 192 bytes."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return offsets, end


def _bytes_tensor(raw: np.ndarray) -> Tensor:
    if raw.flags.writeable:
        return torch.from_numpy(raw)
    # torch warns about read-only memory such as an object store's, so that is copied.
    copied = torch.empty(raw.size, dtype=torch.uint8)
    copied.numpy()[:] = raw
    return copied


def _num_bytes(entry: TensorEntry) -> int:
    return int(np.prod(entry.shape, dtype=np.int64)) * _torch_dtype(entry).itemsize


def _torch_dtype(entry: TensorEntry) -> torch.dtype:
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise WeightError(f"the dtype of tensor {entry.name!r} must be a torch dtype, got {entry.dtype!r}")
    return dtype


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unknown(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f", nearest is {near[0]!r}" if near else ""
    return f"tensor {name!r} must be one of the engine's parameters{hint}; publish canonical names, tied tensors once"


def _some(names: Iterable[str]) -> str:
    """Name up to three, and count the rest."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(repr(name) for name in ordered[:3]) + rest
