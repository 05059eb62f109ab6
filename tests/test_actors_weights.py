import dataclasses
import pickle
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from actors.weights import (
    Bucket,
    InPlaceWeights,
    InProcessTransport,
    Publication,
    TensorEntry,
    WeightError,
    pack_bucket,
    receive,
    unpack_bucket,
)


class Recorder:
    """The part of an engine that a receiver sees, over a real module."""

    def __init__(self, module: nn.Module) -> None:
        self._weights = InPlaceWeights(module)
        self.calls: list[str] = []

    def weight_shapes(self):
        return self._weights.shapes()

    def begin_update(self, version: int, mode: str) -> None:
        self.calls.append(f"begin {version} {mode}")
        self._weights.begin()

    def load(self, tensors) -> None:
        self.calls.append("load")
        self._weights.load(tensors)

    def end_update(self) -> None:
        self._weights.end()
        self.calls.append("end")


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    module = nn.ModuleDict({"embed": nn.Embedding(5, 3), "norm": nn.LayerNorm(3), "head": nn.Linear(3, 5, bias=False)})
    module["head"].weight = module["embed"].weight  # tied
    return module.to(dtype)


def publish(module: nn.Module, version: int = 7) -> Publication:
    named = list(module.named_parameters())
    buckets = []
    for part in (named[:1], named[1:]):
        buffer, entries = pack_bucket(part)
        buckets.append(Bucket(entries=entries, num_bytes=len(buffer), handle=buffer))
    return Publication(version=version, incarnation=0, buckets=tuple(buckets))


def with_entry(publication: Publication, bucket: int, entry: int, **changes) -> Publication:
    entries = list(publication.buckets[bucket].entries)
    entries[entry] = dataclasses.replace(entries[entry], **changes)
    buckets = list(publication.buckets)
    buckets[bucket] = dataclasses.replace(buckets[bucket], entries=tuple(entries))
    return dataclasses.replace(publication, buckets=tuple(buckets))


def test_bucket_layout_by_hand():
    buffer, entries = pack_bucket([("a", torch.tensor([1.0, 2.0])), ("b", torch.tensor([3], dtype=torch.int32))])
    assert buffer.dtype == np.uint8
    assert len(buffer) == 128  # each tensor starts at a multiple of 64 bytes
    assert buffer[:8].view(np.float32).tolist() == [1.0, 2.0]
    assert buffer[64:68].view(np.int32).tolist() == [3]
    expected = zlib.crc32(np.array([1.0, 2.0], dtype=np.float32).tobytes())
    assert entries[0] == TensorEntry(name="a", kind="base", dtype="float32", shape=(2,), fingerprint=expected)
    assert (entries[1].dtype, entries[1].shape) == ("int32", (1,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("read_only", [False, True])
def test_every_dtype_and_shape_survives_the_round_trip(dtype, read_only):
    shapes = [(3, 5), (), (7,), (0,), (2, 1, 9)]
    named = [(str(shape), torch.randn(shape).to(dtype)) for shape in shapes]
    named.append(("transposed", torch.randn(4, 6).to(dtype).t()))
    buffer, entries = pack_bucket(named)
    buffer.flags.writeable = not read_only  # an object store's memory is read-only
    for (name, sent), (found, received) in zip(named, unpack_bucket(buffer, entries), strict=True):
        assert name == found
        assert sent.dtype == received.dtype
        assert torch.equal(sent, received)


def test_receive_brings_a_module_to_the_published_version():
    engine_module, learner = network(0), network(1)
    engine = Recorder(engine_module)
    receive(publish(learner), InProcessTransport(), engine)
    assert engine.calls == ["begin 7 drain", "load", "load", "end"]
    for mine, theirs in zip(engine_module.parameters(), learner.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert engine_module["head"].weight is engine_module["embed"].weight


def test_one_flipped_bit_names_its_tensor():
    publication = publish(network(1))
    publication.buckets[1].handle[64] ^= 1  # norm.bias starts at byte 64
    with pytest.raises(WeightError, match=r"'norm\.bias' must have fingerprint"):
        receive(publication, InProcessTransport(), Recorder(network(0)))


BROKEN = {
    "of another shape": ({"shape": (3, 5)}, r"'embed\.weight' must be float32 \(5, 3\), got float32 \(3, 5\)"),
    "of another dtype": ({"dtype": "float16"}, r"'embed\.weight' must be float32 \(5, 3\), got float16"),
    "unknown": ({"name": "embed.weights"}, r"'embed\.weights' must be one of .* nearest is 'embed\.weight'"),
    "an adapter": ({"kind": "adapter"}, r"'embed\.weight' must be of kind 'base', got 'adapter'"),
    "announced twice": ({"name": "norm.bias"}, r"'norm\.bias' must be "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_announcement_changes_no_weight(case):
    changes, message = BROKEN[case]
    engine = Recorder(network(0))
    with pytest.raises(WeightError, match=message):
        receive(with_entry(publish(network(1)), 0, 0, **changes), InProcessTransport(), engine)
    assert engine.calls == []


def test_missing_tensors_are_listed():
    publication = publish(network(1))
    short = dataclasses.replace(publication, buckets=publication.buckets[:1])
    with pytest.raises(WeightError, match=r"version 7 must bring every tensor, missing 'norm\.bias', 'norm\.weight'"):
        receive(short, InProcessTransport(), Recorder(network(0)))


def test_a_truncated_buffer_is_refused():
    publication = publish(network(1))
    bucket = publication.buckets[0]
    cut = dataclasses.replace(bucket, handle=bucket.handle[:-64])
    short = dataclasses.replace(publication, buckets=(cut, *publication.buckets[1:]))
    with pytest.raises(WeightError, match=r"must be 64 bytes of uint8, got \(0,\)"):
        receive(short, InProcessTransport(), Recorder(network(0)))


def test_weight_errors_survive_pickling():
    error = pickle.loads(pickle.dumps(WeightError("tensor 'a' is bad")))
    assert isinstance(error, WeightError)
    assert str(error) == "tensor 'a' is bad"
