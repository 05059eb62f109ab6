"""Weights on their way from the learner: what is announced, how it is checked, how a receiver takes it.

The learner packs named tensors into buckets and publishes a `Publication`, whose buckets a receiver pulls through a
`WeightTransport`, or sends them through a group of processes (`actors/streams.py`).  Either way the receiver checks
each tensor and copies it in place.  What needs Ray lives in `cluster/transport.py`.
"""

import difflib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from actors.buckets import (
    Changes,
    Load,
    Part,
    Raw,
    TensorEntry,
    WeightError,
    check_fingerprint,
    dtype_name,
    layout,
    unpack_bucket,
    unpack_changes,
)
from actors.fingerprints import fingerprint

if TYPE_CHECKING:
    from actors.engine import Engine, UpdateMode


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A run of tensors that travels as one buffer; `handle` is the transport's."""

    entries: tuple[TensorEntry, ...]
    num_bytes: int  # of what travels
    handle: Any
    num_changed: int | None = None  # words in a bucket of changes, see `actors/buckets.py`; None = all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """Everything a receiver needs to take one version of the policy."""

    version: int
    incarnation: int
    buckets: tuple[Bucket, ...]
    base: int | None = None
    """The version, of the same incarnation, that these are changes to; None = complete in itself."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole version."""
        return sum(bucket.num_bytes for bucket in self.buckets)


class WeightTransport(Protocol):
    """Moves buckets from the learner's rank 0 to any number of receivers, which pull when they are ready."""

    def rooms(self, sizes: Sequence[int]) -> list[Tensor]:
        """Return where to write the buckets of one version, each [size] uint8; the same memory may be several rooms."""

    def put(self, buffer: Tensor) -> Any:
        """Make a bucket, written into its room, available; return the handle to announce.  The next one may be written.

        What was put for the version before need not be there any more.
        """

    def get(self, handle: Any) -> Raw:
        """Return the bytes behind a handle, which are only read."""


def one_room(sizes: Sequence[int]) -> list[Tensor]:
    """Return the same main memory for all buckets, where `put` takes a copy."""
    scratch = torch.empty(max(sizes, default=0), dtype=torch.uint8)
    return [scratch[:size] for size in sizes]


class InProcessTransport:
    """Hands buckets over inside one process: tests, and a learner that shares its process with an engine."""

    def rooms(self, sizes: Sequence[int]) -> list[Tensor]:
        """See `one_room`."""
        return one_room(sizes)

    def put(self, buffer: Tensor) -> Raw:
        """Return a copy of the bucket."""
        return buffer.clone()

    def get(self, handle: Raw) -> Raw:
        """Return the bucket itself."""
        return handle


class Incoming(Protocol):
    """A version on its way to this process."""

    @property
    def version(self) -> int:
        """See `Publication`."""

    @property
    def base(self) -> int | None:
        """See `Publication`."""

    @property
    def plan(self) -> Sequence[TensorEntry]:
        """What will come, fingerprints aside."""

    def arrive(self) -> Iterator[tuple[Bucket, Raw]]:
        """Yield each bucket with its bytes, which are valid until the next one is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A publication that is pulled through a transport."""

    publication: Publication
    transport: WeightTransport

    @property
    def version(self) -> int:
        """Of the publication."""
        return self.publication.version

    @property
    def base(self) -> int | None:
        """Of the publication."""
        return self.publication.base

    @property
    def plan(self) -> list[TensorEntry]:
        """The announced entries."""
        return [entry for bucket in self.publication.buckets for entry in bucket.entries]

    def arrive(self) -> Iterator[tuple[Bucket, Raw]]:
        """Pull each bucket."""
        for bucket in self.publication.buckets:
            yield bucket, self.transport.get(bucket.handle)

    def load_into(self, engine: "Engine", mode: "UpdateMode") -> dict[str, float]:
        """See `take`."""
        return take(self, engine, mode=mode)


def pack_bucket(
    named: Sequence[tuple[str, Tensor]], kind: Literal["base", "adapter"] = "base"
) -> tuple[np.ndarray, tuple[TensorEntry, ...]]:
    """Lay whole tensors into one buffer, each at a multiple of 64 bytes.

    Returns:
        The uint8 buffer, and what is in it.
    """
    offsets, size = layout([tensor.numel() * tensor.element_size() for _, tensor in named])
    buffer = np.zeros(size, dtype=np.uint8)
    entries = []
    for (name, tensor), offset in zip(named, offsets, strict=True):
        # numpy has no bfloat16: the bytes travel, the dtype is a name.
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        buffer[offset : offset + raw.size] = raw
        entry = TensorEntry(
            name=name,
            kind=kind,
            dtype=dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            start=0,
            count=tensor.numel(),
            fingerprint=fingerprint(raw),
        )
        entries.append(entry)
    return buffer, tuple(entries)


def receive(
    publication: Publication,
    transport: WeightTransport,
    engine: "Engine",
    expected: Mapping[str, tuple[tuple[int, ...], str]] | None = None,
    *,
    mode: "UpdateMode" = "drain",
) -> dict[str, float]:
    """Bring an engine to a published version, see `take`."""
    return take(Fetched(publication=publication, transport=transport), engine, expected, mode=mode)


def take(
    incoming: Incoming,
    engine: "Engine",
    expected: Mapping[str, tuple[tuple[int, ...], str]] | None = None,
    *,
    mode: "UpdateMode" = "drain",
) -> dict[str, float]:
    """Bring an engine to the version on its way to it.

    The announcement is checked before a single weight changes; the bytes are checked bucket by bucket.  An engine whose
    update ends early has weights of two versions; it takes no step before a complete version has come.

    Args:
        incoming: what comes.
        engine: takes the weights in place.
        expected: canonical name -> (shape, dtype name); None = what the engine says.
        mode: what becomes of requests that are live.

    Returns:
        Seconds: `wait_s` for buckets, `verify_s` for checking them, `load_s`; changes are checked when loaded.

    Raises:
        WeightError: naming the tensor that is missing, unknown, or of another shape, dtype or fingerprint; or where
            changes are to another version than the engine's.
    """
    _check_announcement(incoming, engine.weight_shapes() if expected is None else expected)
    if incoming.base is not None and engine.version != incoming.base:
        raise WeightError(
            f"changes to version {incoming.base} must be loaded by an engine that has it, got version "
            f"{engine.version}; publish the complete version"
        )
    engine.begin_update(incoming.version, mode)
    seconds = dict.fromkeys(("wait_s", "verify_s", "load_s"), 0.0)
    arriving = incoming.arrive()
    while True:
        start = time.perf_counter()
        item = next(arriving, None)
        come = time.perf_counter()
        seconds["wait_s"] += come - start
        if item is None:
            break
        bucket, raw = item
        if bucket.num_changed is None:
            named = unpack_bucket(raw, bucket.entries)
        else:
            named = unpack_changes(raw, bucket.entries, bucket.num_changed)
        verified = time.perf_counter()
        engine.load(named)
        seconds["verify_s"] += verified - come
        seconds["load_s"] += time.perf_counter() - verified
    engine.end_update()
    return seconds


class InPlaceWeights:
    """A module's parameters as the target of an update: copied in place, by canonical name, each element exactly once.

    In place, because captured graphs and tied parameters hold on to the memory.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = dict(module.named_parameters())  # names tied parameters once
        self._shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        self._missing: dict[str, int] = {}  # name -> next element, of those that have not come entirely
        self._is_whole = True  # all of one version
        self._may_change = False

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return canonical name -> (shape, dtype name)."""
        return {name: (tuple(self._shapes[name]), dtype_name(p.dtype)) for name, p in self._parameters.items()}

    def release(self) -> None:
        """Give the memory back; the next update takes it again, and must bring every element."""
        for parameter in self._parameters.values():
            parameter.data = parameter.data.new_empty(0)
        self._is_whole = False

    def begin(self) -> None:
        """Expect every parameter again; changes only where the update before has come to its end."""
        for name, parameter in self._parameters.items():
            if parameter.shape != self._shapes[name]:  # it was released
                parameter.data = parameter.data.new_empty(self._shapes[name])
        self._missing = dict.fromkeys(self._parameters, 0)
        self._may_change, self._is_whole = self._is_whole, False

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Load]]) -> None:
        """Copy named tensors, or the next part of one, or what has changed in it.

        Raises:
            WeightError: on a name the module does not have, a name that came already, another shape, a part out of
                turn, or changes that do not lead to the announced bytes.
        """
        for name, load in tensors:
            if name not in self._parameters:
                raise WeightError(_unknown(name, self._parameters))
            if name not in self._missing:
                raise WeightError(f"tensor {name!r} must come once in an update that has begun; begin the update again")
            parameter = self._parameters[name]
            match load:
                case Part(start=start, values=values):
                    stop = self._stop(name, start, values.numel())
                    parameter.data.view(-1)[start:stop].copy_(values)
                case Changes(entry=entry):
                    stop = self._stop(name, entry.start, entry.count)
                    self._change(parameter, load)
                case _:
                    if parameter.shape != load.shape:
                        raise WeightError(
                            f"tensor {name!r} must have shape {tuple(parameter.shape)}, got {tuple(load.shape)}; "
                            "learner and engine must run the same architecture"
                        )
                    parameter.copy_(load)
                    stop = parameter.numel()
            self._missing[name] = stop
            if stop == parameter.numel():
                del self._missing[name]

    def _stop(self, name: str, start: int, count: int) -> int:
        """Return where a part ends, after checking that it is the next one."""
        if start != self._missing[name] or start + count > self._parameters[name].numel():
            raise WeightError(
                f"the next part of tensor {name!r} must start at element {self._missing[name]} of "
                f"{self._parameters[name].numel()}, got {count} from {start} on; begin the update again"
            )
        return start + count

    def _change(self, parameter: nn.Parameter, changes: Changes) -> None:
        entry = changes.entry
        if not self._may_change:
            raise WeightError(
                f"changes to tensor {entry.name!r} must meet weights of one version, and the update before did not "
                "come to its end; publish the complete version"
            )
        target = parameter.data.view(-1)[entry.start : entry.start + entry.count]
        result = target.cpu()  # itself on a CPU
        raw = result.view(torch.uint8).numpy()
        raw.view(f"u{changes.word}")[changes.positions] = changes.values
        check_fingerprint(entry, raw)
        if result.data_ptr() != target.data_ptr():
            target.copy_(result)

    def end(self) -> None:
        """Check that every parameter came.

        Raises:
            WeightError: naming those that did not.
        """
        if self._missing:
            raise WeightError(f"an update must bring every tensor, missing {_some(self._missing)}; publish it again")
        self._is_whole = True


def _check_announcement(incoming: Incoming, expected: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    stops: dict[str, int] = {}  # name -> elements announced so far
    for entry in incoming.plan:
        if entry.kind != "base":
            raise WeightError(
                f"tensor {entry.name!r} must be of kind 'base', got {entry.kind!r}; publish merged weights"
            )
        if entry.name not in expected:
            raise WeightError(_unknown(entry.name, expected))
        if (entry.shape, entry.dtype) != expected[entry.name]:
            shape, dtype = expected[entry.name]
            raise WeightError(
                f"tensor {entry.name!r} must be {dtype} {shape}, got {entry.dtype} {entry.shape}; "
                "learner and engine must run the same architecture and publish the engine's dtype"
            )
        if entry.start != stops.get(entry.name, 0) or (entry.count == 0 and entry.name in stops):
            raise WeightError(
                f"tensor {entry.name!r} must be announced once, got elements from {entry.start} on after "
                f"{stops.get(entry.name, 0)}; publish tied tensors once"
            )
        stops[entry.name] = entry.start + entry.count
    missing = {name for name, (shape, _) in expected.items() if stops.get(name, -1) != math.prod(shape)}
    if missing:
        raise WeightError(f"version {incoming.version} must bring every tensor, missing {_some(missing)}")


def _unknown(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f", nearest is {near[0]!r}" if near else ""
    return f"tensor {name!r} must be one of the engine's parameters{hint}; publish canonical names, tied tensors once"


def _some(names: Iterable[str]) -> str:
    """Name up to three, and count the rest."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(repr(name) for name in ordered[:3]) + rest
