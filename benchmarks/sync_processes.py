"""The processes of `benchmarks/sync.py`: learner ranks and receivers, as plain classes that it makes Ray actors of."""

import os
import statistics
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from actors.fingerprints import fingerprint
from actors.streams import StreamOffer, StreamReceiver
from actors.weights import Publication, receive

TIMEOUT_S = 120.0
_ADDRESS = "127.0.0.1"


class Process:
    """What learner ranks and receivers have in common: a place in the raw broadcast, and a watch on their memory."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def ready(self) -> bool:
        """Answer when the process is there."""
        return True

    def join_broadcast(self, port: int, rank: int, size: int, num_bytes: int) -> None:
        """Make the raw broadcast's group and buffer, and touch the buffer."""
        timeout = timedelta(seconds=TIMEOUT_S)
        store = dist.TCPStore(_ADDRESS, port, None, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=_ADDRESS)]
        self._raw_group: Any = dist.ProcessGroupGloo(dist.PrefixStore("raw", store), rank, size, options)
        self._raw_buffer = torch.ones(num_bytes, dtype=torch.uint8)

    def broadcast(self) -> None:
        """Take part in one raw broadcast."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._raw_group.broadcast([self._raw_buffer], options).wait()

    def leave_broadcast(self) -> None:
        """Free group and buffer."""
        del self._raw_group, self._raw_buffer

    @contextmanager
    def watched(self, report: dict[str, float], *, is_on: bool) -> Iterator[None]:
        """Report by how much this process's own memory grows at its peak, bytes; looks every 2 ms."""
        if not is_on:
            yield
            return
        start, peak, ended = _private_bytes(), [0], threading.Event()

        def watch() -> None:
            while not ended.wait(0.002):
                peak[0] = max(peak[0], _private_bytes() - start)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            report["extra_bytes"] = float(peak[0])


class Learner(Process):
    """One rank: a policy in an optimizer engine, and its publisher."""

    def __init__(self, model_dir: str, rank: int, settings: dict[str, Any]) -> None:
        super().__init__()
        from actors.policy import load_model
        from cluster.transport import ObjectStoreTransport
        from learner.config import OptimizerConfig
        from learner.optimizer import make_engine
        from learner.publisher import Publisher

        self._dtype = getattr(torch, settings["dtype"])
        self._model = load_model(model_dir, dtype=self._dtype, device=torch.device("cpu"))
        stage = settings["stage"]
        self._engine = make_engine(
            self._model,
            OptimizerConfig(),
            backend="local" if stage is None else "zero",
            zero_stage=stage or 0,
            rank=rank,
            world_size=settings["ranks"],
            dtype=self._dtype,
        )
        self._publisher = Publisher(
            self._model,
            self._engine,
            ObjectStoreTransport(),
            bucket_bytes=settings["bucket_bytes"],
            has_delta=settings["has_delta"],
        )
        self._masters: dict[str, torch.Tensor] = {}

    def endpoint(self) -> tuple[str, int]:
        """Return where streams meet."""
        return self._publisher.endpoint()

    def num_bytes(self) -> int:
        """Return the size of the policy as it is published."""
        return sum(source.num_bytes for source in self._publisher._sources)

    def publish(
        self, version: int, offer: StreamOffer | None, base: int | None, *, is_watched: bool
    ) -> tuple[Any, dict[str, float]]:
        """Publish; return the announcement and this rank's seconds."""
        report: dict[str, float] = {}
        with self.watched(report, is_on=is_watched):
            announced = self._publisher.publish(version, 0, offer=offer, base=base)
        return announced, report | self._publisher.seconds

    @torch.no_grad()
    def change(self, seed: int, learning_rate: float) -> float:
        """Move every float32 weight by the learning rate, up or down; return which share of bfloat16 ones changed."""
        generator = torch.Generator().manual_seed(seed)
        num_changed = 0
        for name, parameter in self._model.named_parameters():
            stored = getattr(parameter, "ds_tensor", parameter.data)
            master = self._masters.setdefault(name, stored.float()) if self._dtype != torch.float32 else stored
            signs = torch.randint(0, 2, stored.shape, generator=generator, dtype=torch.int8)
            master.add_(signs.to(master.dtype) * (2 * learning_rate) - learning_rate)
            if master is not stored:
                rounded = master.to(stored.dtype)
                num_changed += int((rounded.view(torch.int16) != stored.view(torch.int16)).sum())
                stored.copy_(rounded)
        return num_changed * 2 / self.num_bytes()

    def digests(self) -> dict[str, int]:
        """Return a fingerprint of every tensor."""
        return {name: digest for run in self._publisher.tensors() for name, digest in fingerprints(run).items()}


class Receiver(Process):
    """One engine."""

    def __init__(self, model_dir: str, settings: dict[str, Any]) -> None:
        super().__init__()
        from actors.policy import load_model
        from actors.torch_engine import TorchEngine
        from cluster.transport import ObjectStoreTransport

        model = load_model(model_dir, dtype=getattr(torch, settings["dtype"]), device=torch.device("cpu"))
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # until it is written, a loaded one is a page of a file
        tokenizer: Any = None  # no text is made
        self._model = model
        # an engine's own use of weights it has is no part of bringing them, see `packing_s`
        self._engine = TorchEngine(model, tokenizer, max_rows=4, eos_ids=frozenset({0}), pack_weights=False)
        self._receiver = StreamReceiver()
        self._transport = ObjectStoreTransport()

    def fetch(self, publication: Publication, *, is_watched: bool) -> dict[str, float]:
        """Take a publication."""
        report: dict[str, float] = {}
        with self.watched(report, is_on=is_watched):
            report |= receive(publication, self._transport, self._engine)
        return report

    def join(self, offer: StreamOffer, member: str, *, is_watched: bool) -> dict[str, float]:
        """Take a stream."""
        report: dict[str, float] = {}
        with self.watched(report, is_on=is_watched):
            report |= self._receiver.open(offer.seat(member)).load_into(self._engine, "drain")
        return report

    def packing_s(self, repeats: int) -> float:
        """Return the seconds in which an engine on a CPU packs the weights of a new version, from now on packed."""
        from actors.packed_linear import pack, repack

        pack(self._model)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            with torch.inference_mode():
                repack(self._model)
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    def digests(self) -> dict[str, int]:
        """Return a fingerprint of every tensor."""
        return fingerprints(self._model.named_parameters())

    def version(self) -> int:
        """Return the engine's version."""
        return self._engine.version


def fingerprints(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    """Return the fingerprint of every tensor's bytes."""
    return {name: fingerprint(tensor.detach().reshape(-1).view(torch.uint8)) for name, tensor in named}


def _private_bytes() -> int:
    """Return this process's own memory, without files and what it shares."""
    with open("/proc/self/statm", encoding="ascii") as file:
        resident, shared = map(int, file.read().split()[1:3])
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
