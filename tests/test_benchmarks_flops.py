import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.flops import Count, Group, forward_flops, needed_flops
from cluster.model_config import read_shape, shape_of

SETTINGS = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 40, "vocab_size": 50,
}  # fmt: skip
SHAPE = shape_of({"model_type": "llama", **SETTINGS}, where="test")


def llama():
    return LlamaForCausalLM(LlamaConfig(**SETTINGS, attn_implementation="eager"))


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


def is_torchs_count(shape):
    """Compare with torch, up to the rotary embedding's small products (outer products of positions: 8 a token)."""
    count = Count(tokens=11, pairs=11 * 11, logits=11)
    return abs(forward_flops(shape, count) - counted_by_torch(11)) <= 8 * 11


def test_operations_are_those_that_torch_counts():
    assert is_torchs_count(SHAPE)


@pytest.mark.parametrize(
    "planted",
    [{"num_key_value_heads": 4}, {"intermediate_size": 27}, {"num_hidden_layers": 2}, {"vocab_size": 24}],
)
def test_wrong_shapes_are_caught(planted):
    assert not is_torchs_count(shape_of({"model_type": "llama", **SETTINGS, **planted}, where="test"))


def test_a_backward_pass_costs_twice_its_forward_pass():
    forward, both = counted_by_torch(11), counted_by_torch(11, has_backward=True)
    assert both == pytest.approx(3 * forward, rel=1e-3)


def test_a_step_needs_each_pass_once():
    groups = [Group(prompt=3, lengths=(2, 1)), Group(prompt=5, lengths=(4, 4))]
    tokens = sum((group.log_probs() for group in groups), Count())
    states = sum((group.states() for group in groups), Count())
    one, judged = forward_flops(SHAPE, tokens), forward_flops(SHAPE, states)
    assert needed_flops(SHAPE, groups, critic="none", has_judge=False) == {
        "generate": one, "score": one, "train": 3 * one,
    }  # fmt: skip
    separate = needed_flops(SHAPE, groups, critic="separate", has_judge=True)
    assert separate == {"generate": one, "score": one + judged, "train": 3 * one + 3 * judged}
    trunk = needed_flops(SHAPE, groups, critic="trunk", has_judge=True)
    # the states after the last tokens are all that a value head adds
    assert 3 * one < trunk["train"] < 3 * one + 3 * judged


def test_shapes_are_read_from_a_model_directory(tmp_path):
    llama().save_pretrained(tmp_path)
    count = Count(tokens=11, pairs=66, logits=11)
    assert forward_flops(read_shape(str(tmp_path)), count) == forward_flops(SHAPE, count)
