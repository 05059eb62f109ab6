import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actors.buckets import unpack_changes
from learner.config import OptimizerConfig
from learner.delta import DeltaPacker
from learner.optimizer import make_engine
from learner.shares import Shares
from learner.sources import plan_buckets, sources

CONFIG = LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
)


def packer_of(model):
    engine = make_engine(model, OptimizerConfig(), backend="local", zero_stage=0)
    plans = plan_buckets(sources(model), 64 * 1024)
    assert len(plans) == 1
    shares = Shares(engine)
    packer = DeltaPacker(engine, shares, plans)
    packer.remember(0)
    packer.end(1, 0)
    return packer, shares, plans[0]


def test_bits_are_compared_not_values():
    """-0 equals 0 and NaN equals nothing: a comparison of values would miss the one and send the other for ever."""
    model = LlamaForCausalLM(CONFIG)
    weight = model.model.norm.weight
    weight.data[:3] = torch.tensor([0.0, float("nan"), 1.0])
    packer, shares, plan = packer_of(model)
    weight.data[0] = -0.0
    assert (weight.data[:3] == torch.tensor([0.0, float("nan"), 1.0])).tolist() == [True, False, True]
    out = torch.zeros(plan.num_bytes, dtype=torch.uint8)
    packed = packer.pack(0, out)
    assert (packed.num_changed, packed.num_bytes) == (1, 8)
    entries = [entry for entry in plan.entries if entry.name == "model.norm.weight"]
    found = dict(unpack_changes(out[:8], plan.entries, 1))["model.norm.weight"]
    assert found.positions.tolist() == [0]
    assert found.values.view(np.float32).tobytes() == np.array([-0.0], np.float32).tobytes()
    assert entries[0].shape == (8,)
    whole = torch.zeros(plan.num_bytes, dtype=torch.uint8)
    shares.fill(plan, whole)
    assert packer.pack(0, out).num_changed == 0  # what was sent is remembered


def test_a_bucket_travels_whole_where_its_changes_are_larger():
    model = LlamaForCausalLM(CONFIG)
    packer, shares, plan = packer_of(model)
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    out, whole = (torch.zeros(plan.num_bytes, dtype=torch.uint8) for _ in range(2))
    packed = packer.pack(0, out)
    shares.fill(plan, whole)
    assert (packed.num_changed, packed.num_bytes) == (None, plan.num_bytes)
    assert torch.equal(out, whole)


def test_changes_follow_only_what_was_sent_last():
    packer, _, _ = packer_of(LlamaForCausalLM(CONFIG))
    assert packer.can_follow(1, 0)
    assert not packer.can_follow(None, 0)
    assert not packer.can_follow(0, 0)
    assert not packer.can_follow(1, 1)
    packer.begin()
    assert not packer.can_follow(1, 0)
