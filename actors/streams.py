"""Weights as a broadcast through a group of processes: the learner's first rank and the rollout workers it was told of.

The group (`actors.wires`) is named by an epoch: it stays while its members do; when one of them goes, or a stream
breaks, the next offer brings another epoch and group.

What travels, one version a stream: the size of the plan; the plan (JSON: version, base, every entry of every bucket);
then each bucket's bytes with its entries' fingerprints at the end.  In a stream of changes, whose buckets have sizes of
their own, a header [number of changed words or -1, bytes] goes before each.  A receiver needs nothing but the offer.
Sender and receivers have two buffers each, used in turn: while one travels, the sender fills the other, and a receiver
loads the other.

Nobody waits longer than the offer's `timeout_s` for one message.  After that, or when a peer is gone, the group is
given up on this side, which ends it for the other members, and `StreamError` says why.
"""

import contextlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from actors.buckets import TensorEntry, layout
from actors.weights import Bucket, take
from actors.wires import WireKind, open_wire, own_address

if TYPE_CHECKING:
    from actors.engine import Engine, UpdateMode

_SENDER = 0
_COMPLETE = -1
_MAX_PLAN_BYTES = 2**30


class StreamError(RuntimeError):
    """A stream of weights broke; the group is given up, and the version must come another way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOffer:
    """Who will get a version, and where they meet.  Rank 0 of the group is the learner's."""

    epoch: int  # of the group; another one whenever members change or a stream broke
    address: str  # of the first rank's store, see `StreamSender.endpoint`
    port: int
    members: tuple[str, ...]  # the receivers; the i-th one, from 0, is rank i + 1
    version: int
    incarnation: int
    timeout_s: float  # for one message
    wire: WireKind = "gloo"

    def seat(self, member: str) -> "StreamSeat":
        """Return the offer as one of the members gets it."""
        return StreamSeat(offer=self, rank=self.members.index(member) + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSeat:
    """An offer to one receiver."""

    offer: StreamOffer
    rank: int


class _Group:
    """One epoch's process group on this side, and the two buffers that it keeps from stream to stream."""

    def __init__(self, store: dist.Store, offer: StreamOffer, rank: int, hostname: str) -> None:
        self.epoch = offer.epoch
        own_store = dist.PrefixStore(f"weights/{offer.epoch}", store)
        _meet(own_store, offer, rank)
        self._wire = open_wire(
            offer.wire,
            own_store,
            rank=rank,
            size=len(offer.members) + 1,
            timeout_s=offer.timeout_s,
            hostname=hostname,
        )
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        self._turn = 0
        self._on_their_way: deque[Callable[[], None]] = deque()

    def next_buffer(self, num_bytes: int) -> torch.Tensor:
        """Return [num_bytes] uint8 of the buffer that was used before the last one."""
        self._turn ^= 1
        if self._buffers[self._turn].numel() < num_bytes:
            self._buffers[self._turn] = torch.empty(num_bytes, dtype=torch.uint8)
        return self._buffers[self._turn][:num_bytes]

    def begin(self, tensor: torch.Tensor) -> None:
        """Begin to send or receive a tensor, after those before."""
        self._on_their_way.append(self._wire.begin(tensor))

    def wait(self) -> None:
        """Wait until nothing is on its way."""
        while self._on_their_way:
            self._on_their_way[0]()
            self._on_their_way.popleft()

    def close(self) -> None:
        """End it for all members."""
        self._on_their_way.clear()
        self._wire.close()


def _meet(store: dist.Store, offer: StreamOffer, rank: int) -> None:
    """Wait until the sender and all members are there; RuntimeError when they are not in time."""
    store.set(f"here/{rank}", "")
    places = {f"here/{_SENDER}": "the sender"} | {f"here/{i}": name for i, name in enumerate(offer.members, 1)}
    try:
        store.wait(list(places), timedelta(seconds=offer.timeout_s))
    except RuntimeError as error:
        if rank != _SENDER:  # whose store may be out of reach by now
            raise
        missing = ", ".join(name for place, name in places.items() if not store.check([place]))
        raise RuntimeError(f"{missing} did not come within {offer.timeout_s:g} s") from error


class StreamSender:
    """The first rank's side: keeps the store where members meet, and the group while its epoch lasts.

    Args:
        address: of this process, as the members see it.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._store: dist.TCPStore | None = None
        self._group: _Group | None = None
        self._not_sent = ""  # what to say when the stream breaks
        self._filling = torch.empty(0, dtype=torch.uint8)
        self._has_headers = False

    @property
    def endpoint(self) -> tuple[str, int]:
        """Address and port where members meet."""
        if self._store is None:
            self._store = dist.TCPStore(self._address, 0, None, is_master=True, wait_for_workers=False)
        return self._address, self._store.port

    def begin(self, offer: StreamOffer, buckets: Sequence[Sequence[TensorEntry]], *, base: int | None) -> None:
        """Meet the members and tell them what will come.

        Raises:
            StreamError: when one of them does not come in time; likewise the other methods.
        """
        plan = json.dumps(
            {
                "version": offer.version,
                "base": base,
                "buckets": [[asdict(entry) for entry in bucket] for bucket in buckets],
            }
        )
        raw = torch.from_numpy(np.frombuffer(plan.encode(), dtype=np.uint8).copy())
        peers = f"to {', '.join(offer.members)} from {offer.address}:{offer.port}"
        self._not_sent = f"version {offer.version} could not be sent {peers}"
        with self._giving_up(f"version {offer.version} could not be offered {peers}"):
            if self._group is None or self._group.epoch != offer.epoch:
                self.close()
                if self.endpoint != (offer.address, offer.port):  # of a process that this one has replaced
                    raise RuntimeError(f"members meet at {offer.address}:{offer.port} and this sender is elsewhere")
                assert self._store is not None
                self._store.set_timeout(timedelta(seconds=offer.timeout_s))
                self._group = _Group(self._store, offer, _SENDER, self._address)
            self._has_headers = base is not None
            self._group.begin(torch.tensor([raw.numel()]))
            self._group.begin(raw)
            self._group.wait()

    def buffer(self, num_bytes: int, num_entries: int) -> torch.Tensor:
        """Return a free buffer, [num_bytes] uint8, for the next bucket."""
        assert self._group is not None, "a stream has begun"
        self._filling = self._group.next_buffer(num_bytes + 8 * num_entries)
        return self._filling[:num_bytes]

    def send(self, num_bytes: int, fingerprints: Sequence[int], num_changed: int | None = None) -> None:
        """Send what `buffer` returned, filled up to `num_bytes`; returns when the one before has been sent."""
        assert self._group is not None, "a stream has begun"
        self.wait()
        message = self._filling[: num_bytes + 8 * len(fingerprints)]
        message.numpy()[num_bytes:].view(np.uint64)[:] = np.array(fingerprints, dtype=np.uint64)
        with self._giving_up(self._not_sent):
            if self._has_headers:
                header = torch.tensor([_COMPLETE if num_changed is None else num_changed, num_bytes])
                self._group.begin(header)
            self._group.begin(message)

    def wait(self) -> None:
        """Wait until all has been sent."""
        assert self._group is not None, "a stream has begun"
        with self._giving_up(self._not_sent):
            self._group.wait()

    def close(self) -> None:
        """End the group; the store stays."""
        if self._group is not None:
            self._group.close()
            self._group = None

    @contextlib.contextmanager
    def _giving_up(self, what: str) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, OSError) as error:  # torch's distributed errors are RuntimeErrors
            self.close()
            raise _stream_error(what, error) from error


class StreamReceiver:
    """A worker's side: keeps the group while its epoch lasts.  One stream at a time."""

    def __init__(self) -> None:
        self._group: _Group | None = None
        self._endpoint = ("", 0)

    def open(self, seat: StreamSeat) -> "IncomingStream":
        """Meet the others and receive everything up to the first bucket.

        Raises:
            StreamError: when nothing comes in time.
        """
        offer = seat.offer
        with _giving_up(self, f"version {offer.version} did not begin to come"):
            if self._group is None or (self._group.epoch, *self._endpoint) != (offer.epoch, offer.address, offer.port):
                self.close()
                self._endpoint = (offer.address, offer.port)
                timeout = timedelta(seconds=offer.timeout_s)
                store = dist.TCPStore(offer.address, offer.port, None, is_master=False, timeout=timeout)
                self._group = _Group(store, offer, seat.rank, own_address(offer.address))
            size = torch.zeros(1, dtype=torch.int64)
            self._group.begin(size)
            self._group.wait()
            if not 0 < int(size) < _MAX_PLAN_BYTES:
                raise RuntimeError(f"a plan must have up to {_MAX_PLAN_BYTES} bytes, got {int(size)}")
            raw = torch.empty(int(size), dtype=torch.uint8)
            self._group.begin(raw)
            self._group.wait()
            stream = IncomingStream(self, self._group, json.loads(raw.numpy().tobytes()))
            stream.begin()
            return stream

    @property
    def sender(self) -> str:
        """Address and port of the newest offer."""
        return "{}:{}".format(*self._endpoint)

    def close(self) -> None:
        """End the group."""
        if self._group is not None:
            self._group.close()
            self._group = None


class IncomingStream:
    """One version on its way; implements `actors.weights.Incoming`."""

    def __init__(self, receiver: StreamReceiver, group: _Group, plan: dict[str, Any]) -> None:
        self._receiver = receiver
        self._group = group
        self._version: int = plan["version"]
        self._base: int | None = plan["base"]
        self._buckets = [tuple(map(_entry, bucket)) for bucket in plan["buckets"]]
        self._arriving: _Arriving | None = None

    @property
    def version(self) -> int:
        """Of the policy."""
        return self._version

    @property
    def base(self) -> int | None:
        """See `Publication`."""
        return self._base

    @property
    def plan(self) -> list[TensorEntry]:
        """All entries, without fingerprints."""
        return [entry for bucket in self._buckets for entry in bucket]

    def begin(self) -> None:
        """Wait for the first bucket's bytes."""
        if self._buckets:
            self._arriving = self._begin_bucket(0)
            self._group.wait()

    def load_into(self, engine: "Engine", mode: "UpdateMode") -> dict[str, float]:
        """Bring an engine to the version, see `actors.weights.take`; where that fails, nobody waits for this receiver.

        Raises:
            StreamError: when a bucket does not come in time.
            WeightError: when what comes is not what was announced or expected.
        """
        try:
            return take(self, engine, mode=mode)
        except BaseException:
            self._receiver.close()
            raise

    def arrive(self) -> Iterator[tuple[Bucket, np.ndarray]]:
        """Yield each bucket with its bytes, while the next one is on its way; StreamError when it does not come."""
        for index, entries in enumerate(self._buckets):
            with _giving_up(self._receiver, f"version {self._version} broke off in bucket {index}"):
                arriving = self._arriving or self._begin_bucket(index)
                self._group.wait()
                is_last = index + 1 == len(self._buckets)
                # the size of changes is told later, and waiting for it would keep these bytes from being loaded
                self._arriving = None if is_last or self._base is not None else self._begin_bucket(index + 1)
            raw = arriving.buffer.numpy()
            size = raw.size - 8 * len(entries)
            found = raw[size:].view(np.uint64).tolist()
            checked = tuple(replace(entry, fingerprint=f) for entry, f in zip(entries, found, strict=True))
            bucket = Bucket(entries=checked, num_bytes=size, handle=None, num_changed=arriving.num_changed)
            yield bucket, raw[:size]

    def _begin_bucket(self, index: int) -> "_Arriving":
        entries = self._buckets[index]
        num_bytes = longest = layout([entry.num_bytes for entry in entries])[1]
        num_changed = _COMPLETE
        if self._base is not None:
            header = torch.zeros(2, dtype=torch.int64)
            self._group.begin(header)
            self._group.wait()
            num_changed, num_bytes = header.tolist()
        if not 0 <= num_bytes <= longest:
            raise RuntimeError(f"bucket {index} must have up to {longest} bytes, got {num_bytes}")
        buffer = self._group.next_buffer(num_bytes + 8 * len(entries))
        self._group.begin(buffer)
        return _Arriving(buffer=buffer, num_changed=None if num_changed == _COMPLETE else num_changed)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Arriving:
    """A bucket on its way."""

    buffer: torch.Tensor
    num_changed: int | None


@contextlib.contextmanager
def _giving_up(receiver: StreamReceiver, what: str) -> Iterator[None]:
    """Turn whatever breaks into a StreamError, and end the receiver's group, so that nobody waits for it."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        receiver.close()
        raise _stream_error(f"{what} from {receiver.sender}", error) from error


def _stream_error(what: str, error: RuntimeError | OSError) -> StreamError:
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    said = re.sub(r"\[/[^]]*\] ?", "", said)  # gloo names its source files
    return StreamError(
        f"{what}: {said}; publish the version through the object store, and where all of them live, let their nodes "
        "reach each other on every port"
    )


def _entry(fields: dict[str, Any]) -> TensorEntry:
    return TensorEntry(**{**fields, "shape": tuple(fields["shape"])})
