import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.flops import Architecture, Count, Group, needed_flops, read_architecture

SHAPES = Architecture(hidden=24, layers=3, heads=4, kv_heads=2, head_dim=8, intermediate=40, vocab=50)


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            intermediate_size=40, vocab_size=50, attn_implementation="eager",
        )
    )  # fmt: skip


def counted_by_torch(tokens, *, has_backward=False):
    """Return what torch counts for a causal row; masked pairs are computed too, so all `tokens`^2 of them."""
    model = llama()
    ids = torch.zeros(1, tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids).logits.sum()
        if has_backward:
            loss.backward()
    return counter.get_total_flops()


def test_a_group_is_counted_as_worked_by_hand():
    group = Group(prompt=3, lengths=(2, 1))
    assert group.log_probs() == Count(tokens=4, pairs=10, logits=2)
    # responses see 4 + 5 and 4 positions
    assert group.states() == Count(tokens=6, pairs=6 + 9 + 4, logits=0)
    assert group.states(logits=True).logits == 2


def is_torchs_count(shapes):
    """Compare with torch, up to the rotary embedding's small products (outer products of positions: 8 a token)."""
    count = Count(tokens=11, pairs=11 * 11, logits=11)
    return abs(shapes.forward_flops(count) - counted_by_torch(11)) <= 8 * 11


def test_operations_are_those_that_torch_counts():
    assert is_torchs_count(SHAPES)


@pytest.mark.parametrize("planted", [{"kv_heads": 4}, {"intermediate": 27}, {"layers": 2}, {"vocab": 24}])
def test_wrong_shapes_are_caught(planted):
    assert not is_torchs_count(dataclasses.replace(SHAPES, **planted))


def test_a_backward_pass_costs_twice_its_forward_pass():
    forward, both = counted_by_torch(11), counted_by_torch(11, has_backward=True)
    assert both == pytest.approx(3 * forward, rel=1e-3)


def test_a_step_needs_each_pass_once():
    groups = [Group(prompt=3, lengths=(2, 1)), Group(prompt=5, lengths=(4, 4))]
    tokens = sum((group.log_probs() for group in groups), Count())
    states = sum((group.states() for group in groups), Count())
    one, judged = SHAPES.forward_flops(tokens), SHAPES.forward_flops(states)
    assert needed_flops(SHAPES, groups, critic="none", has_judge=False) == {
        "generate": one, "score": one, "train": 3 * one,
    }  # fmt: skip
    separate = needed_flops(SHAPES, groups, critic="separate", has_judge=True)
    assert separate == {"generate": one, "score": one + judged, "train": 3 * one + 3 * judged}
    trunk = needed_flops(SHAPES, groups, critic="trunk", has_judge=True)
    # the states after the last tokens are all that a value head adds
    assert 3 * one < trunk["train"] < 3 * one + 3 * judged


def test_shapes_are_read_from_a_model_directory(tmp_path):
    llama().save_pretrained(tmp_path)
    assert read_architecture(str(tmp_path)) == SHAPES
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="got 'gpt2'"):
        read_architecture(str(tmp_path))
