"""Modules to send and to receive, and both sides of a stream as threads of one process."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from actors.buckets import TensorEntry, dtype_name, layout
from actors.fingerprints import fingerprint
from actors.streams import StreamOffer, StreamReceiver, StreamSender
from actors.weights import InPlaceWeights


class Recorder:
    """The part of an engine that a receiver sees, over a real module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.version = -1
        self.calls: list[str] = []
        self._weights = InPlaceWeights(module)
        self._next = -1

    def weight_shapes(self):
        return self._weights.shapes()

    def begin_update(self, version: int, mode: str) -> None:
        self.calls.append(f"begin {version} {mode}")
        self._next = version
        self._weights.begin()

    def load(self, tensors) -> None:
        self.calls.append("load")
        self._weights.load(tensors)

    def end_update(self) -> None:
        self._weights.end()
        self.version = self._next
        self.calls.append("end")


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    module = nn.ModuleDict({"embed": nn.Embedding(5, 3), "norm": nn.LayerNorm(3), "head": nn.Linear(3, 5, bias=False)})
    module["head"].weight = module["embed"].weight  # tied
    return module.to(dtype)


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def buckets_of(module: nn.Module, max_elements: int = 8) -> list[tuple[list[TensorEntry], np.ndarray]]:
    """Cut a module into buckets of one part each, with their bytes."""
    buckets = []
    for name, parameter in module.named_parameters():
        flat = parameter.detach().reshape(-1)
        for start in range(0, flat.numel(), max_elements):
            part = flat[start : start + max_elements]
            entry = TensorEntry(
                name=name, kind="base", dtype=dtype_name(part.dtype), shape=tuple(parameter.shape), start=start,
                count=part.numel(), fingerprint=0,
            )  # fmt: skip
            raw = np.zeros(layout([entry.num_bytes])[1], dtype=np.uint8)
            raw[: entry.num_bytes] = part.contiguous().view(torch.uint8).numpy()
            buckets.append(([entry], raw))
    return buckets


def offer_of(sender: StreamSender, members: Sequence[str], *, epoch=1, version=7, timeout_s=20.0) -> StreamOffer:
    address, port = sender.endpoint
    return StreamOffer(
        epoch=epoch, address=address, port=port, members=tuple(members), version=version, incarnation=0,
        timeout_s=timeout_s,
    )  # fmt: skip


def send(sender, offer, module: nn.Module, *, max_elements: int = 8, damage=lambda index, raw: None) -> None:
    """Send a module; `damage` may change a bucket after its fingerprint was taken."""
    buckets = buckets_of(module, max_elements)
    sender.begin(offer, [entries for entries, _ in buckets], base=None)
    for index, (entries, raw) in enumerate(buckets):
        out = sender.buffer(raw.size, len(entries)).numpy()
        out[:] = raw
        found = [fingerprint(raw[: entry.num_bytes]) for entry in entries]
        damage(index, out)
        sender.send(raw.size, found)
    sender.wait()


class Background:
    """Runs a function in a thread; `result` waits for it and raises what it raised."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._outcome: list[Any] = []
        self._error: list[BaseException] = []

        def run() -> None:
            try:
                self._outcome.append(function())
            except BaseException as error:
                self._error.append(error)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def result(self, timeout_s: float = 30.0) -> Any:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "still running"
        if self._error:
            raise self._error[0]
        return self._outcome[0]


def receiving(receiver: StreamReceiver, offer: StreamOffer, member: str, engine: Recorder) -> Background:
    """Let a receiver take a version in the background."""
    return Background(lambda: receiver.open(offer.seat(member)).load_into(engine, "drain"))
