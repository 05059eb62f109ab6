import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from actors.buckets import (
    Changes,
    Part,
    TensorEntry,
    WeightError,
    changes_bytes,
    pack_changes,
    unpack_bucket,
    unpack_changes,
)
from actors.fingerprints import _mixed, fingerprint, fingerprint_there
from actors.weights import Bucket, InPlaceWeights, InProcessTransport, Publication, pack_bucket, receive
from tests.weights_toys import Recorder, buckets_of, network


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
    word = 0x40000000_3F800000  # 2.0 and 1.0, little-endian
    expected = word * int(_mixed(np.zeros(1))[0]) ** 2 % 2**64  # column and row weight of word 0 are the same
    assert entries[0] == TensorEntry(
        name="a", kind="base", dtype="float32", shape=(2,), start=0, count=2, fingerprint=expected
    )
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


def test_fingerprints_of_parts_add_up_and_exchanged_words_are_seen():
    raw = np.random.default_rng(0).integers(0, 256, 3 * 8192 + 21, dtype=np.uint8)
    whole = fingerprint(raw)
    for cuts in ((0, 0, 5), (3, 11, 8192), (8191, 8193, 20000), (8, 16384, 24590)):
        parts = zip((0, *cuts), (*cuts, raw.size), strict=True)
        assert sum(fingerprint(raw[start:stop], at=start) for start, stop in parts) % 2**64 == whole
    words = raw[:24576].view(np.uint64)
    for first, second in ((0, 1), (5, 5 + 1024), (1023, 2048)):  # in a row, in a column, anywhere
        swapped = words.copy()
        swapped[[first, second]] = words[[second, first]]
        assert fingerprint(swapped.view(np.uint8)) != fingerprint(words.view(np.uint8))
        assert swapped.sum() == words.sum()  # the planted bug: a sum without weights does not see it
    assert fingerprint(raw[:0]) == 0


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 8184, 8191, 8192, 8193, 3 * 8192 + 21])
def test_fingerprints_told_on_a_device_are_those_told_in_main_memory(size):
    raw = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    assert fingerprint_there(torch.from_numpy(raw)) == fingerprint(raw)
    assert fingerprint(torch.from_numpy(raw)) == fingerprint(raw)


def test_parts_come_in_order_and_all_of_them():
    learner, engine = network(1), Recorder(network(0))
    buckets = buckets_of(learner, max_elements=8)  # embed.weight has 15 elements
    assert [(e.name, e.start, e.count) for entries, _ in buckets[:2] for e in entries] == [
        ("embed.weight", 0, 8),
        ("embed.weight", 8, 7),
    ]
    announced = []
    for entries, raw in buckets:
        checked = tuple(dataclasses.replace(e, fingerprint=fingerprint(raw[: e.num_bytes])) for e in entries)
        announced.append(Bucket(entries=checked, num_bytes=raw.size, handle=raw))
    publication = Publication(version=7, incarnation=0, buckets=tuple(announced))
    receive(publication, InProcessTransport(), engine)
    for mine, theirs in zip(engine.module.parameters(), learner.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for wrong in (announced[1:], [announced[0], *announced[2:]], [announced[1], announced[0], *announced[2:]]):
        broken = dataclasses.replace(publication, buckets=tuple(wrong))
        with pytest.raises(WeightError, match=r"must be announced once|missing 'embed\.weight'"):
            receive(broken, InProcessTransport(), engine)
    weights = InPlaceWeights(engine.module)
    weights.begin()
    with pytest.raises(WeightError, match=r"must start at element 0 of 15, got 7 from 8 on"):
        weights.load([("embed.weight", Part(start=8, values=torch.zeros(7)))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_changed", "is_list"), [(0, True), (2, True), (30, False)])
def test_changes_lead_to_every_bit(dtype, num_changed, is_list):
    torch.manual_seed(0)
    module = nn.ParameterDict({"a": torch.randn(5, 7).to(dtype), "b": torch.randn(200).to(dtype)})
    before, _ = pack_bucket(list(module.items()))
    with torch.no_grad():
        flat = module["b"].data.view(-1)
        flat[torch.randperm(200)[:num_changed]] *= -1
        if num_changed:
            module["a"].data[0, 0] = float("nan")
    after, entries = pack_bucket(list(module.items()))
    word = f"u{entries[0].itemsize}"
    positions = np.flatnonzero(before.view(word) != after.view(word))
    out = np.zeros(after.size, np.uint8)
    num_words = after.size // entries[0].itemsize
    size = pack_changes(positions, after.view(word)[positions], num_words, out)
    assert size == changes_bytes(positions.size, num_words, entries[0].itemsize)
    assert (size == positions.size * (4 + entries[0].itemsize)) == is_list
    engine = nn.ParameterDict({name: value.clone() for (name, value) in unpack_bucket(before, named(entries, before))})
    weights = InPlaceWeights(engine)
    weights.begin()
    weights.load(unpack_changes(out[:size], entries, positions.size))
    weights.end()
    assert pack_bucket(list(engine.items()))[0].tobytes() == after.tobytes()


def named(entries, raw) -> list[TensorEntry]:
    """The entries, as they are announced for other bytes."""
    found, start = [], 0
    for entry in entries:
        found.append(dataclasses.replace(entry, fingerprint=fingerprint(raw[start : start + entry.num_bytes])))
        start += -(-entry.num_bytes // 64) * 64
    return found


def test_changes_are_refused_by_weights_they_do_not_belong_to():
    module = nn.ParameterDict({"a": torch.arange(4.0)})
    result, entries = pack_bucket([("a", torch.tensor([0.0, 5.0, 2.0, 3.0]))])
    change = Changes(entry=entries[0], word=4, positions=np.array([1]), values=result[:16].view(np.uint32)[1:2].copy())
    weights = InPlaceWeights(module)
    weights.begin()
    weights.load([("a", change)])
    weights.end()
    assert module["a"].tolist() == [0.0, 5.0, 2.0, 3.0]
    module["a"].data[3] = 9.0  # another version
    weights.begin()
    with pytest.raises(WeightError, match="'a' must have fingerprint"):
        weights.load([("a", change)])
    weights.begin()  # after an update that did not end
    with pytest.raises(WeightError, match="publish the complete version"):
        weights.load([("a", change)])
    weights.begin()
    weights.load([("a", torch.tensor([0.0, 1.0, 2.0, 3.0]))])
    weights.end()
    weights.begin()
    weights.load([("a", change)])
    weights.end()
    publication = Publication(version=9, incarnation=0, base=8, buckets=())
    engine = Recorder(nn.ParameterDict({}))
    engine.version = 7
    with pytest.raises(WeightError, match=r"changes to version 8 .* got version 7"):
        receive(publication, InProcessTransport(), engine)
    assert engine.calls == []
