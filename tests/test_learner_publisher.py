import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from actors.streams import StreamReceiver
from actors.weights import InProcessTransport, Publication, receive
from learner.config import LoraConfig, OptimizerConfig
from learner.model import add_lora
from learner.optimizer import make_engine
from learner.outlets import Streamed
from learner.publisher import Publisher
from learner.sources import Source, plan_buckets
from tests.weights_toys import Recorder, offer_of, receiving, same_bits

ROOT = Path(__file__).parent.parent
CONFIG = LlamaConfig(
    vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
BUCKET_BYTES = 1200
"""Smaller than the embedding and some of the layers' matrices."""


def policy(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(CONFIG).to(dtype)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def publisher_of(model, transport=None, *, backend="local", stage=0, ranks=(0, 1), **settings) -> Publisher:
    engine = make_engine(
        model,
        OptimizerConfig(),
        backend=backend,
        zero_stage=stage,
        rank=ranks[0],
        world_size=ranks[1],
        dtype=next(model.parameters()).dtype,
    )
    return Publisher(model, engine, transport or InProcessTransport(), **{"bucket_bytes": BUCKET_BYTES, **settings})


def change(model: nn.Module, seed: int, share: float) -> None:
    """Change some elements of every tensor; the same ones whoever calls."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            stored = getattr(parameter, "ds_tensor", parameter.data)
            stored.mul_(1 - 2 * (torch.rand(stored.shape, generator=generator) < share).to(stored.dtype))


def test_tensors_are_cut_into_buckets_as_the_example_says():
    sizes = {"a": 960, "b": 480, "c": 4000, "d": 320}
    listed = [
        Source(name=name, parameters=(nn.Parameter(torch.zeros(size // 4)),), adapted=None)
        for name, size in sizes.items()
    ]
    plans = plan_buckets(listed, 1600)
    found = [[(entry.name, entry.start * 4, entry.count * 4) for entry in plan.entries] for plan in plans]
    assert found == [
        [("a", 0, 960), ("b", 0, 480)],
        [("c", 0, 1600)],
        [("c", 1600, 1600)],
        [("c", 3200, 800), ("d", 0, 320)],
    ]
    assert [plan.num_bytes for plan in plans] == [960 + 512, 1600, 1600, 832 + 320]


def test_a_publication_brings_every_bit_in_buckets_of_bounded_size():
    model = policy(1)
    publication = publisher_of(model).publish(3, 0)
    assert isinstance(publication, Publication)
    assert max(bucket.num_bytes for bucket in publication.buckets) <= BUCKET_BYTES
    assert len(publication.buckets) > 10
    engine = Recorder(policy(2))
    receive(publication, InProcessTransport(), engine)
    assert same_bits(engine.module, model)


def test_adapters_are_merged_and_the_result_is_what_export_writes():
    model = policy(1)
    add_lora(model, LoraConfig(rank=2, alpha=4.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    publisher = publisher_of(model)
    engine = Recorder(policy(2))
    receive(publisher.publish(3, 0), InProcessTransport(), engine)
    exported = {name: tensor.clone() for named in publisher.tensors() for name, tensor in named}
    found = dict(engine.module.named_parameters())
    assert exported.keys() == found.keys()
    assert all(torch.equal(exported[name], found[name]) for name in found)
    plain = policy(1)
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], plain.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_and_changes_bring_the_same_bits(dtype):
    model = policy(1, dtype)
    publisher = publisher_of(model, has_delta=True)
    engine, receiver = Recorder(policy(2, dtype)), StreamReceiver()
    sizes = []
    for version, base, share in ((1, None, 0), (2, 1, 0.01), (3, 2, 0.9), (4, None, 0.01), (5, 3, 0.01)):
        change(model, version, share)
        offer = offer_of(publisher._sender, "a", version=version)
        coming = receiving(receiver, offer, "a", engine)
        announced = publisher.publish(version, 0, offer=offer, base=base)
        coming.result()
        assert isinstance(announced, Streamed)
        assert announced.failure == ""
        assert announced.base == (base if version < 5 else None)  # version 3 is not what was sent last
        assert same_bits(engine.module, model)
        sizes.append(announced.num_bytes)
    full, small, most, *_ = sizes
    assert small < full / 8
    assert most <= full
    assert sizes[3:] == [full, full]
    change(model, 6, 0.01)
    changes = publisher.publish(6, 0, base=5)
    assert changes.base == 5
    assert changes.num_bytes < full / 8
    receive(changes, InProcessTransport(), engine)
    assert same_bits(engine.module, model)
    assert publisher.publish(7, 1, base=6).base is None  # another incarnation


def test_a_broken_stream_is_told_and_the_store_brings_the_version():
    model = policy(1)
    publisher = publisher_of(model, has_delta=True)
    offer = offer_of(publisher._sender, "ab", version=1, timeout_s=0.5)
    announced = publisher.publish(1, 0, offer=offer)
    assert isinstance(announced, Streamed)
    assert "could not be offered to a, b" in announced.failure
    engine = Recorder(policy(2))
    publication = publisher.publish(1, 0, base=0)
    assert publication.base is None
    receive(publication, InProcessTransport(), engine)
    assert same_bits(engine.module, model)
    alone = offer_of(publisher._sender, "a", epoch=2, version=2)
    coming = receiving(StreamReceiver(), alone, "a", engine)
    change(model, 2, 0.5)
    assert publisher.publish(2, 0, offer=alone).failure == ""
    coming.result()
    assert same_bits(engine.module, model)


def ranks_main(rank: int, port: int, out: str) -> None:
    """Be one of two ranks: publish with every ZeRO stage, complete and as changes; rank 0 writes what does not fit."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    wrong = []
    for dtype in (torch.float32, torch.bfloat16):
        for stage in range(4):
            publisher = publisher_of(policy(1, dtype), backend="zero", stage=stage, ranks=(rank, 2), has_delta=True)
            engine, sizes = Recorder(policy(2, dtype)), []
            for version, base in ((1, None), (2, 1), (3, 2)):
                change(publisher.policy, version, 0.02)
                publication = publisher.publish(version, 0, base=base)
                expected = {name: tensor.clone() for named in publisher.tensors() for name, tensor in named}
                if publication is None:
                    continue
                receive(publication, InProcessTransport(), engine)
                sizes.append(publication.num_bytes)
                found = dict(engine.module.named_parameters())
                good = all(torch.equal(found[name], tensor) for name, tensor in expected.items())
                if not good or publication.base != base or found.keys() != expected.keys():
                    wrong.append(f"{dtype} stage {stage} version {version}")
            if rank == 0 and not max(sizes[1:]) < sizes[0] / 4:
                wrong.append(f"{dtype} stage {stage} sizes {sizes}")
            offer = offer_of(publisher._sender, "a", version=4, timeout_s=0.5)
            answer = publisher.publish(4, 0, offer=offer)  # nobody comes, and both ranks get to the end
            if rank == 0 and "could not be offered" not in answer.failure:
                wrong.append(f"{dtype} stage {stage} stream")
    if rank == 0:
        Path(out).write_text(json.dumps(wrong))


@pytest.mark.slow
def test_two_ranks_of_every_zero_stage(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path / "wrong.json"
    code = "import sys; from tests.test_learner_publisher import ranks_main as m; m(int(sys.argv[1]), {}, {!r})"
    command = [sys.executable, "-c", code.format(port, str(out))]
    ranks = [subprocess.Popen([*command, str(rank)], cwd=ROOT) for rank in range(2)]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    assert json.loads(out.read_text()) == []


def test_rank_zero_alone_takes_shards_as_they_are():
    """One ZeRO-3 rank: its shard is the tensor, and nothing is gathered."""
    model = policy(1)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    publisher = publisher_of(model, backend="zero", stage=3)
    publisher._engine.gathered = None  # type: ignore[assignment]
    engine = Recorder(policy(2))
    receive(publisher.publish(1, 0), InProcessTransport(), engine)
    found = dict(engine.module.named_parameters())
    assert all(np.array_equal(found[name].detach().numpy(), tensor.numpy()) for name, tensor in expected.items())
