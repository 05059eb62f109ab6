"""Where the first rank's buckets go: into a transport, from which receivers pull, or as a stream to all members."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from actors.streams import StreamError, StreamOffer, StreamSender
from actors.weights import Bucket, Publication, WeightTransport
from learner.delta import Packed
from learner.sources import BucketPlan

_NOTHING = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Streamed:
    """What became of a version that was sent through a group of processes."""

    version: int
    incarnation: int
    num_bytes: int
    base: int | None
    """The version, of the same incarnation, that changes were sent to; None = everything was sent."""
    failure: str
    """Why not all members can have it, so that it must come to them another way; empty where all was sent."""


class Outlet(Protocol):
    """Takes one version, bucket after bucket."""

    failure: str
    """Why it takes no more; empty while it does."""

    def begin(self, plans: Sequence[BucketPlan], base: int | None) -> None:
        """Say what comes: all buckets, or changes to `base`."""

    def buffer(self, plan: BucketPlan) -> Tensor:
        """Return where to write the next bucket, [num_bytes] uint8."""

    def send(self, plan: BucketPlan, packed: Packed) -> None:
        """Take what has been written; the next bucket may be written meanwhile."""

    def finish(self, version: int, incarnation: int) -> Publication | Streamed | None:
        """Wait until all is taken; return what is announced."""


class NoOutlet:
    """On the ranks that send nothing themselves."""

    failure = ""

    def begin(self, plans: Sequence[BucketPlan], base: int | None) -> None:
        """Do nothing, likewise the others."""

    def buffer(self, plan: BucketPlan) -> Tensor:
        """Return nothing to write to."""
        return _NOTHING

    def send(self, plan: BucketPlan, packed: Packed) -> None:
        """Do nothing."""

    def finish(self, version: int, incarnation: int) -> None:
        """Announce nothing."""


class StoreOutlet:
    """Puts each bucket into a transport."""

    failure = ""

    def __init__(self, transport: WeightTransport) -> None:
        self._transport = transport
        self._rooms: list[Tensor] = []
        self._buckets: list[Bucket] = []
        self._base: int | None = None

    def begin(self, plans: Sequence[BucketPlan], base: int | None) -> None:
        """Make room."""
        self._rooms = self._transport.rooms([plan.num_bytes for plan in plans])
        self._base = base

    def buffer(self, plan: BucketPlan) -> Tensor:
        """Return the next bucket's room."""
        return self._rooms[len(self._buckets)]

    def send(self, plan: BucketPlan, packed: Packed) -> None:
        """Put it."""
        checked = zip(plan.entries, packed.fingerprints, strict=True)
        bucket = Bucket(
            entries=tuple(replace(entry, fingerprint=found) for entry, found in checked),
            num_bytes=packed.num_bytes,
            handle=self._transport.put(self.buffer(plan)[: packed.num_bytes]),
            num_changed=packed.num_changed,
        )
        self._buckets.append(bucket)

    def finish(self, version: int, incarnation: int) -> Publication:
        """Announce it."""
        return Publication(version=version, incarnation=incarnation, buckets=tuple(self._buckets), base=self._base)


class StreamOutlet:
    """Broadcasts each bucket; after a failure it drops what comes, so that the other ranks come to the end."""

    def __init__(self, sender: StreamSender, offer: StreamOffer) -> None:
        self.failure = ""
        self._sender = sender
        self._offer = offer
        self._num_bytes = 0
        self._base: int | None = None

    def begin(self, plans: Sequence[BucketPlan], base: int | None) -> None:
        """Meet the receivers."""
        self._base = base
        self._attempt(lambda: self._sender.begin(self._offer, [plan.entries for plan in plans], base=base))

    def buffer(self, plan: BucketPlan) -> Tensor:
        """Return one of two buffers in turn."""
        if self.failure:
            return torch.empty(plan.num_bytes, dtype=torch.uint8)
        return self._sender.buffer(plan.num_bytes, len(plan.pieces))

    def send(self, plan: BucketPlan, packed: Packed) -> None:
        """Wait for the bucket before, and send this one meanwhile."""
        self._num_bytes += packed.num_bytes
        self._attempt(lambda: self._sender.send(packed.num_bytes, packed.fingerprints, packed.num_changed))

    def finish(self, version: int, incarnation: int) -> Streamed:
        """Wait for the last bucket, and tell what became of the version."""
        self._attempt(self._sender.wait)
        return Streamed(
            version=version,
            incarnation=incarnation,
            num_bytes=self._num_bytes,
            base=self._base,
            failure=self.failure,
        )

    def _attempt(self, call: Callable[[], None]) -> None:
        if self.failure:
            return
        try:
            call()
        except StreamError as error:
            self.failure = str(error)
