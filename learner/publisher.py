"""Sends the policy's weights out: gathered bucket by bucket, named as Hugging Face names them, adapters merged.

The value head is not part of the policy and never leaves; tied weights leave once.  A model directory for
`from_pretrained` is the same tensors, written by transformers.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from actors.cache import swapped_in
from actors.fingerprints import fingerprint
from actors.streams import StreamOffer, StreamSender
from actors.weights import Publication, WeightTransport
from learner.delta import DeltaPacker, Packed
from learner.optimizer import OptimizerEngine
from learner.outlets import NoOutlet, Outlet, StoreOutlet, Streamed, StreamOutlet
from learner.shares import Shares
from learner.sources import plan_buckets, runs, sources

DEFAULT_BUCKET_BYTES = 32 * 2**20

_USED_SHARE = 15 / 16
"""Of a bucket."""


class Publisher:
    """Announces versions of the policy.  Every method is called on all ranks together, except `endpoint`.

    Args:
        policy: the Hugging Face model inside the engine's module.
        engine: owns its parameters.
        transport: rank 0 puts buffers there.
        bucket_bytes: no bucket is larger; two of them bound what a rank holds beside its parameters.
        has_delta: whether to keep what was sent last, to be able to send changes to it.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        engine: OptimizerEngine,
        transport: WeightTransport,
        *,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        has_delta: bool = False,
    ) -> None:
        self.policy = policy
        self.seconds: dict[str, float] = {}
        """Of the last publication on this rank: `gather_s` to fill buckets, `fingerprint_s`, `send_s` spent waiting."""
        self._engine = engine
        self._transport = transport
        self._bucket_bytes = bucket_bytes
        self._sources = sources(policy)
        # what lies around two buckets (plan, fingerprints, the group's own) shall not make them more than two
        self._plans = plan_buckets(self._sources, int(bucket_bytes * _USED_SHARE) // 64 * 64)
        self._shares = Shares(engine)
        self._delta = DeltaPacker(engine, self._shares, self._plans) if has_delta and self._shares.is_direct else None
        self._sender = StreamSender(os.environ.get("MASTER_ADDR", "127.0.0.1"))
        self._newest: Publication | Streamed | None = None

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank is the one that sends and writes."""
        return self._engine.rank == 0

    def endpoint(self) -> tuple[str, int]:
        """Return the address and port where the receivers of a stream meet rank 0, on rank 0."""
        return self._sender.endpoint

    def publish(
        self, version: int, incarnation: int, *, offer: StreamOffer | None = None, base: int | None = None
    ) -> Publication | Streamed | None:
        """Send all weights; return the announcement on rank 0.

        The newest announcement is kept, and with it the transport's handles; the one before is let go first.

        Args:
            version: of the policy.
            incarnation: of the learner.
            offer: who gets it through a group of processes; None = whoever pulls it from the transport.
            base: a version of this incarnation that every receiver has.  Only changes are sent where it is the version
                that was sent last and is remembered.
        """
        self._newest = None
        self.seconds = dict.fromkeys(("gather_s", "fingerprint_s", "send_s"), 0.0)
        outlet = self._outlet(offer)
        delta = self._delta
        base = base if delta is not None and delta.can_follow(base, incarnation) else None
        if delta is not None:
            delta.begin()
        with self._measured("send_s"):
            outlet.begin(self._plans, base)
        is_abandoned = False
        for index, plan in enumerate(self._plans):
            is_abandoned = (
                bool(outlet.failure) and self._engine.world_size == 1
            )  # else the other ranks are on their way
            if is_abandoned:
                break
            packed = self._pack(index, outlet.buffer(plan), base)
            with self._measured("send_s"):
                outlet.send(plan, packed)
        with self._measured("send_s"):
            self._newest = outlet.finish(version, incarnation)
        if delta is not None and not is_abandoned:
            delta.end(version, incarnation)
        return self._newest

    def tensors(self) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Yield runs of (canonical name, tensor on the CPU) on rank 0, empty ones elsewhere; collective."""
        for run in self.gathered():
            yield [(name, tensor.cpu()) for name, tensor in run()] if self.is_first_rank else []

    def gathered(self) -> Iterator[Callable[[], list[tuple[str, torch.Tensor]]]]:
        """Yield, run by run, a function to (canonical name, whole tensor on the device); collective."""
        for run in runs(self._sources, self._bucket_bytes):
            with self._engine.gathered([p for source in run for p in source.parameters]), torch.no_grad():
                yield lambda run=run: [(source.name, source.tensor()) for source in run]  # type: ignore[misc]

    def _outlet(self, offer: StreamOffer | None) -> Outlet:
        if not self.is_first_rank:
            return NoOutlet()
        return StoreOutlet(self._transport) if offer is None else StreamOutlet(self._sender, offer)

    @torch.no_grad()
    def _pack(self, index: int, out: torch.Tensor, base: int | None) -> Packed:
        """Write one bucket, complete or as changes, into `out` on rank 0."""
        plan = self._plans[index]
        with self._measured("gather_s"):
            if self._delta is not None and base is not None:
                return self._delta.pack(index, out)
            self._shares.fill(plan, out)
            if self._delta is not None:
                self._delta.remember(index)
        found = []
        if self.is_first_rank:
            with self._measured("fingerprint_s"):
                found = [fingerprint(out[p.offset : p.offset + p.entry.num_bytes]) for p in plan.pieces]
        return Packed(num_bytes=plan.num_bytes, num_changed=None, fingerprints=found)

    @contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


def export_policy(publisher: Publisher, directory: str, *, model_dir: str) -> None:
    """Write a directory that `AutoModelForCausalLM.from_pretrained` loads, with the tokenizer of `model_dir`.

    Weights are safetensors in the dtype of the forward pass, adapters merged.  The directory is whole or as it was
    before: a policy that lies there is replaced by a complete one only.

    Raises:
        OSError: when the disk does not take it, or something else lies there.
    """
    weights = {name: tensor.clone() for named in publisher.tensors() for name, tensor in named}
    if not publisher.is_first_rank:
        return
    policy = publisher.policy
    with torch.device("meta"):  # a skeleton without adapters, sharding or a swapped head
        skeleton = type(policy)(policy.config)
    persistent = {name: buffer for name, buffer in policy.named_buffers() if name in skeleton.state_dict()}
    skeleton.load_state_dict(weights | persistent, strict=False, assign=True)
    skeleton.tie_weights()
    skeleton.generation_config = policy.generation_config
    directory = os.path.realpath(directory)
    if os.path.lexists(directory) and not _is_replaceable(directory):
        raise FileExistsError(
            f"{directory} must be empty or hold a policy's config.json to be replaced; choose another"
        )
    with swapped_in(directory) as temporary:
        try:
            skeleton.save_pretrained(temporary)
        except SafetensorError as error:
            raise OSError(f"the weights could not be written to {temporary}: {error}") from error
        _copy_companions(model_dir, temporary)


def _copy_companions(model_dir: str, directory: str) -> None:
    for name in sorted(os.listdir(model_dir)):
        source, target = os.path.join(model_dir, name), os.path.join(directory, name)
        if os.path.isfile(source) and _is_companion(name) and not os.path.exists(target):
            shutil.copyfile(source, target)


def _is_replaceable(directory: str) -> bool:
    return os.path.isdir(directory) and (not os.listdir(directory) or "config.json" in os.listdir(directory))


def _is_companion(name: str) -> bool:
    """Return whether a model directory's file goes with any weights: tokenizer, chat template, code."""
    return not name.endswith((".safetensors", ".bin", ".index.json", ".pt", ".pth", ".gguf", ".msgpack", ".h5"))
