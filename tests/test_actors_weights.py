from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.torch_engine import TorchEngine
from actors.weights import (
    Bucket,
    InProcessTransport,
    Publication,
    WeightError,
    pack_bucket,
    receive,
    unpack_bucket,
)
from tests.learner_toys import toy_model


class _NoTokenizer:
    """The engine only decodes with it, and nothing is generated here."""


def _engine():
    return TorchEngine(toy_model(), _NoTokenizer(), max_rows=4, eos_ids=frozenset({2}))


def _publication(model, version=1, dtype=torch.float32):
    named = [(name, parameter.detach().to(dtype)) for name, parameter in model.named_parameters()]
    buckets = []
    for part in (named[:3], named[3:]):
        buffer, entries = pack_bucket(part)
        buckets.append(Bucket(entries=entries, num_bytes=buffer.nbytes, handle=buffer))
    return Publication(version=version, incarnation=0, buckets=tuple(buckets))


def _other_model():
    model = toy_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.01)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bucket_gives_back_what_went_in(dtype):
    tensors = [
        ("a", torch.randn(3, 5).to(dtype)),
        ("b", torch.randn(7).to(dtype)),
        ("scalar", torch.tensor(2.0).to(dtype)),
    ]
    buffer, entries = pack_bucket(tensors)
    assert buffer.dtype == np.uint8
    assert [entry.name for entry in entries] == ["a", "b", "scalar"]
    buffer.setflags(write=False)  # as it comes from an object store
    for (name, expected), (found_name, found) in zip(tensors, unpack_bucket(buffer, entries), strict=True):
        assert name == found_name
        assert torch.equal(found, expected)


def test_received_weights_are_the_published_ones_to_the_bit():
    engine, model = _engine(), _other_model()
    receive(_publication(model, version=7), InProcessTransport(), engine)
    assert engine.version == 7
    expected = dict(model.named_parameters())
    for name, parameter in engine._model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_one_flipped_bit_is_named_and_the_version_stays():
    engine, publication = _engine(), _publication(_other_model())
    bucket = publication.buckets[1]
    bucket.handle[bucket.handle.size // 2] ^= 1
    with pytest.raises(WeightError, match=r"the bytes of tensor '[\w.]+' must have fingerprint"):
        receive(publication, InProcessTransport(), engine)
    assert engine.version == -1


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("missing", "lm_head|embed|layers|norm"),
        ("unknown", "stranger"),
        ("shape", r"must be float32 \(61, 32\), got"),
        ("dtype", "bfloat16"),
    ],
)
def test_what_does_not_fit_is_named_before_a_weight_changes(damage, named):
    engine, model = _engine(), _other_model()
    before = {name: parameter.clone() for name, parameter in engine._model.named_parameters()}
    publication = _publication(model, dtype=torch.bfloat16 if damage == "dtype" else torch.float32)
    first, second = publication.buckets
    if damage == "missing":
        publication = replace(publication, buckets=(first,))
    elif damage == "unknown":
        buffer, entries = pack_bucket([("stranger", torch.zeros(2))])
        extra = Bucket(entries=entries, num_bytes=buffer.nbytes, handle=buffer)
        publication = replace(publication, buckets=(first, second, extra))
    elif damage == "shape":
        entry = replace(first.entries[0], shape=(1, *first.entries[0].shape))
        publication = replace(publication, buckets=(replace(first, entries=(entry, *first.entries[1:])), second))
    with pytest.raises(WeightError, match=named):
        receive(publication, InProcessTransport(), engine)
    for name, parameter in engine._model.named_parameters():
        assert torch.equal(parameter, before[name]), name
