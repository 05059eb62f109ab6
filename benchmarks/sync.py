"""What it takes to bring a policy of SmolLM2-135M's shape from the learner to two engines, by transport and ZeRO stage.

One learner rank (or more) and two receivers with real engines, each a Ray actor with one torch thread.  A sync runs
from the call that publishes to the moment when both engines have the new version, every byte checked.  In turn with it,
in the same processes, one buffer of as many bytes is broadcast through gloo and checked by nobody: the ratio of the two
is the result.  The learner's weights change between syncs, and after every sync all bits of the engines are compared
with the learner's.

What an engine on a CPU takes on top to pack the weights for its products is reported apart: it is the price of faster
decoding, whichever way weights came.

Extra memory is what a process's own memory (not the object store's, which is shared and bounded) grows by at its peak
during its first sync, over the size of a bucket: the largest of all processes, transports and stages.  Figures for
changes only are of a bfloat16 policy whose float32 weights have moved by the learning rate, up or down, as the first
update of Adam would move them.  Prints tables, and last one line of JSON.

    python -m benchmarks.sync [--repeats 3] [--ranks 1] [--bucket-mb 32]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch

from actors.streams import StreamOffer
from benchmarks.machine import finish
from benchmarks.sync_processes import TIMEOUT_S, Learner, Receiver

MEMBERS = ("receiver-0", "receiver-1")
TRANSPORTS = ("object_store", "process_group")
LEARNING_RATES = (1e-6, 1e-5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """One sync: seconds of its parts, the slowest receiver's where they are receivers', and what it took."""

    seconds: dict[str, float]
    num_bytes: int
    extra_buckets: float
    """0 where nobody watched."""


class Bench:
    """The processes of one setting, and the measurements that are made with them."""

    def __init__(self, model_dir: str, **settings: Any) -> None:
        self._bucket_bytes = settings["bucket_bytes"]
        options: dict[str, Any] = {"num_cpus": 0}
        variables = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}
        variables |= {"MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(settings["ranks"]), "LOCAL_RANK": "0"}
        learner: Any = ray.remote(Learner)
        receiver: Any = ray.remote(Receiver)
        self._ranks = [
            learner.options(**options, runtime_env={"env_vars": variables | {"RANK": str(rank)}}).remote(
                model_dir, rank, settings
            )
            for rank in range(settings["ranks"])
        ]
        self._receivers = [
            receiver.options(**options, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}}).remote(model_dir, settings)
            for _ in MEMBERS
        ]
        self._all = [*self._ranks, *self._receivers]
        ray.get([process.ready.remote() for process in self._all])
        self.endpoint = ray.get(self._ranks[0].endpoint.remote())
        self.num_bytes: int = ray.get(self._ranks[0].num_bytes.remote())
        self.version = 0
        self.epoch = 1

    def change(self, learning_rate: float = 1e-4) -> float:
        """Change the learner's weights; return the share of bits that did."""
        shares: list[float] = ray.get([r.change.remote(self.version, learning_rate) for r in self._ranks])
        return sum(shares)

    def sync(self, transport: str, *, base: int | None = None, is_watched: bool = False) -> Sync:
        """Bring the next version to all engines."""
        self.version += 1
        watch = {"is_watched": is_watched}
        started = time.perf_counter()
        offer = self._offer() if transport == "process_group" else None
        coming: list[Any] = []
        if offer is not None:
            seats = zip(self._receivers, MEMBERS, strict=True)
            coming = [receiver.join.remote(offer, member, **watch) for receiver, member in seats]
        publishing = [rank.publish.remote(self.version, offer, base, **watch) for rank in self._ranks]
        announced, sender = ray.get(publishing)[0]
        published = time.perf_counter()
        if offer is None:
            coming = [receiver.fetch.remote(announced, **watch) for receiver in self._receivers]
        elif announced.failure:
            raise RuntimeError(announced.failure)
        receivers = ray.get(coming)
        total = time.perf_counter() - started
        extra = [report.pop("extra_bytes", 0.0) for report in (sender, *receivers)]
        slowest = {name: max(report[name] for report in receivers) for name in receivers[0]}
        return Sync(
            seconds={"total_s": total, "publish_s": published - started, **sender, **slowest},
            num_bytes=announced.num_bytes,
            extra_buckets=max(extra) / self._bucket_bytes,
        )

    def broadcast(self) -> float:
        """Return the seconds of one raw broadcast."""
        group = [self._ranks[0], *self._receivers]
        started = time.perf_counter()
        ray.get([process.broadcast.remote() for process in group])
        return time.perf_counter() - started

    @contextmanager
    def raw_broadcast(self) -> Iterator[None]:
        """Have a group and buffers for it."""
        group, port = [self._ranks[0], *self._receivers], _free_port()
        ray.get([p.join_broadcast.remote(port, rank, len(group), self.num_bytes) for rank, p in enumerate(group)])
        try:
            yield
        finally:
            ray.get([process.leave_broadcast.remote() for process in group])

    def check(self) -> None:
        """Compare all bits of learner and engines."""
        sent, *received = ray.get([process.digests.remote() for process in [*self._ranks[:1], *self._receivers]])
        versions = ray.get([receiver.version.remote() for receiver in self._receivers])
        if versions != [self.version] * len(MEMBERS) or any(found != sent for found in received):
            raise RuntimeError("an engine's weights must be the learner's bit for bit, and are not")

    def packing_s(self, repeats: int) -> float:
        """Return what both engines, at once, take to pack a float32 version that has come, seconds."""
        return max(ray.get([receiver.packing_s.remote(repeats) for receiver in self._receivers]))

    def close(self) -> None:
        """End the processes."""
        for process in self._all:
            ray.kill(process)

    def _offer(self) -> StreamOffer:
        address, port = self.endpoint
        return StreamOffer(
            epoch=self.epoch,
            address=address,
            port=port,
            members=MEMBERS,
            version=self.version,
            incarnation=0,
            timeout_s=TIMEOUT_S,
        )


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, object_store_memory=3 * 10**9)
    settings = {"bucket_bytes": int(arguments.bucket_mb * 2**20), "ranks": arguments.ranks}
    report: dict[str, Any] = {"ranks": arguments.ranks, "bucket_mb": arguments.bucket_mb, "repeats": arguments.repeats}
    extra: dict[str, float] = dict.fromkeys(TRANSPORTS, 0.0)
    with tempfile.TemporaryDirectory() as directory:
        model_dir = _random_model(directory, arguments.layers)
        for stage in arguments.stages:
            figures, of_stage = _stage(model_dir, settings, stage, arguments.repeats)
            report |= figures
            extra = {transport: max(extra[transport], of_stage[transport]) for transport in TRANSPORTS}
        report["extra_buckets"] = round(max(extra.values()), 2)
        report |= {f"extra_buckets_{transport}": round(found, 2) for transport, found in extra.items()}
        if not arguments.no_delta:
            report |= _delta(model_dir, settings, arguments.repeats)
    finish(report, arguments.output)


def _stage(
    model_dir: str, settings: dict[str, Any], stage: int, repeats: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """Measure both transports and the raw broadcast, in turn; return figures, and extra memory by transport."""
    bench = Bench(model_dir, **settings, stage=stage, dtype="float32", has_delta=False)
    syncs: dict[str, list[Sync]] = {transport: [] for transport in TRANSPORTS}
    raw: list[float] = []
    extra = {}
    with bench.raw_broadcast():
        bench.broadcast()  # the first of each makes groups and touches memory
        for transport in TRANSPORTS:
            extra[transport] = bench.sync(transport, is_watched=True).extra_buckets
            bench.check()
        for _ in range(repeats):
            raw.append(bench.broadcast())
            for transport in TRANSPORTS:
                bench.change()
                syncs[transport].append(bench.sync(transport))
                bench.check()
    packing = bench.packing_s(repeats)
    bench.close()
    broadcast = statistics.median(raw)
    report: dict[str, Any] = {
        f"zero{stage}_broadcast_s": round(broadcast, 3),
        f"zero{stage}_packing_over_broadcast": round(packing / broadcast, 2),
    }
    print(f"ZeRO-{stage}, {bench.num_bytes / 1e6:.0f} MB: raw broadcast {broadcast:.3f} s", flush=True)
    totals = {}
    for transport, found in syncs.items():
        parts = _medians(found)
        totals[transport] = parts["total_s"]
        shown = "  ".join(f"{name} {value:.3f}" for name, value in parts.items())
        print(f"  {transport:13} {shown}  extra {extra[transport]:.2f} buckets", flush=True)
        report[f"zero{stage}_{transport}"] = parts
    best = min(totals, key=lambda transport: totals[transport])
    report |= {f"zero{stage}_best": best, f"zero{stage}_over_broadcast": round(totals[best] / broadcast, 2)}
    print(f"  best: {best}, {totals[best] / broadcast:.2f} times the raw broadcast", flush=True)
    return report, extra


def _delta(model_dir: str, settings: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Measure changes against everything, in bfloat16."""
    bench = Bench(model_dir, **settings, stage=2, dtype="bfloat16", has_delta=True)
    report: dict[str, Any] = {}
    for transport in TRANSPORTS:
        bench.sync(transport)
        for learning_rate in LEARNING_RATES:
            full: list[Sync] = []
            delta: list[Sync] = []
            shares = []
            for _ in range(repeats):
                for syncs in (full, delta):
                    shares.append(bench.change(learning_rate))
                    syncs.append(bench.sync(transport, base=bench.version if syncs is delta else None))
                    bench.check()
            full_s, delta_s = _medians(full)["total_s"], _medians(delta)["total_s"]
            figures = {
                "changed": round(statistics.median(shares), 4),
                "full_s": full_s,
                "delta_s": delta_s,
                "bytes_over_full": round(delta[-1].num_bytes / full[-1].num_bytes, 3),
                "speedup": round(full_s / delta_s, 2),
            }
            name = f"delta_{transport}_lr_{learning_rate:g}"
            report[name] = figures
            print(name, figures, flush=True)
    bench.close()
    return report


def _medians(syncs: list[Sync]) -> dict[str, float]:
    """Return the median of each part, seconds."""
    return {name: round(statistics.median(sync.seconds[name] for sync in syncs), 3) for name in syncs[0].seconds}


def _random_model(directory: str, num_layers: int | None) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.judges import SHAPE

    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": num_layers or SHAPE["num_hidden_layers"]})
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement; the median is reported")
    parser.add_argument("--ranks", type=int, default=1, help="of the learner")
    parser.add_argument("--bucket-mb", type=float, default=32.0, help="MiB in a bucket")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3], help="of ZeRO")
    parser.add_argument("--layers", type=int, help="of the model; fewer for a quick look")
    parser.add_argument("--no-delta", action="store_true", help="leave the figures for changes out")
    parser.add_argument("--output", help="file for the line of JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
