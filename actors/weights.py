"""Weights on their way from the learner: what is announced, how it is checked, how a receiver takes it.

The learner packs named tensors into buckets and publishes a `Publication`; a receiver pulls bucket after bucket through a
`WeightTransport`, checks each tensor and copies it in place.  Transports that need Ray live in `cluster/transport.py`.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np


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
