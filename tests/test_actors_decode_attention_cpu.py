"""The compiled kernel of decoding against float64: what it stores, what it must not read, and whom it must not see."""

import pytest
import torch

from actors import decode_attention_cpu as kernels
from actors.slots import AttentionRule, Decode, SlotCache
from tests.decode_cases import SHAPES, inputs, reference

TOLERANCE = 2e-6


def attend(query, keys, values, positions, *, rule):
    """Run the kernel: the new tokens' keys and values are handed over, and nothing stands in their places before."""
    rows = torch.arange(len(positions))
    key, value = keys[rows, :, positions], values[rows, :, positions]
    stored = [slots.clone() for slots in (keys, values)]
    for slots in stored:
        slots[rows, :, positions] = torch.nan
    output = kernels.decode_attention(
        query, key, value, *stored, positions, **{"scaling": query.shape[-1] ** -0.5, **rule}
    )
    for slots, whole in zip(stored, (keys, values), strict=True):
        torch.testing.assert_close(slots, whole, rtol=0, atol=0, equal_nan=True)
    return output


def error(name, *, reference_rule=None, **rule):
    (query, keys, values), positions = inputs(name)
    found = attend(query, keys, values, positions, rule=rule)
    expected = reference(query, keys, values, positions, scaling=query.shape[-1] ** -0.5, **(reference_rule or rule))
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", SHAPES)
def test_equals_float64_and_stores_what_is_new(name):
    assert error(name) < TOLERANCE


@pytest.mark.parametrize("rule", [{"sliding_window": 6}, {"softcap": 2.0}, {"sliding_window": 70, "softcap": 5.0}])
def test_windows_and_caps(rule):
    assert error("few rows, long", **rule) < TOLERANCE


@pytest.mark.parametrize("wrong", [{"softcap": 50.0}, {"softcap": 2.0, "sliding_window": 399}])
def test_a_rule_that_is_left_out_is_seen(wrong):
    """Planted bug: a reference with another rule, as a kernel without one would be."""
    right = {"softcap": 2.0, "sliding_window": 20}
    assert error("few rows, long", **right, reference_rule=wrong) > 1e-2


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rule", [{}, {"sliding_window": 6}, {"softcap": 2.0}, {"sliding_window": 70, "softcap": 5.0}])
def test_torchs_own_attention_over_slots_agrees(name, rule):
    """The way of other numbers and devices, here in float64, and the kernel, over the same slots."""
    (query, keys, values), positions = inputs(name)
    values = values.nan_to_num(1e3)  # a mask gives weight zero, which takes NaN along
    rule = AttentionRule(**{"scaling": None, "sliding_window": None, "softcap": None, **rule})
    rows = torch.arange(len(positions))
    outputs = []
    for dtype in (torch.float32, torch.float64):
        cache = SlotCache(len(keys))
        cache.keys, cache.values = [keys.to(dtype)], [values.to(dtype)]
        new = [slots[rows, :, positions][:, :, None].to(dtype) for slots in (keys, values)]
        context = Decode(cache, positions, keys.shape[2])
        outputs.append(context.attend(0, query[:, :, None].to(dtype), *new, rule).double())
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_scores_far_apart_and_far_from_zero():
    """exp over the whole range: a key that decides all, scores of hundreds, scores that are all the same."""
    for factor in (0.0, 1e-3, 30.0, 300.0):
        (query, keys, values), positions = inputs("one head each")
        query *= factor
        found = attend(query, keys, values, positions, rule={})
        expected = reference(query, keys, values, positions, scaling=query.shape[-1] ** -0.5)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_has_the_same_bits_in_any_company(name):
    (query, keys, values), positions = inputs(name)
    together = attend(query, keys, values, positions, rule={})
    for row in range(len(query)):
        one = slice(row, row + 1)
        alone = attend(query[one], keys[one], values[one], positions[one], rule={})
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_what_is_not_a_number_stays_so_in_its_row_alone(broken):
    (query, keys, values), positions = inputs("many heads share")
    whole = attend(query, keys, values, positions, rule={})
    keys[1, 0, int(positions[1]) // 2, 3] = broken
    found = attend(query, keys, values, positions, rule={})
    assert found[1].isnan().any()
    assert torch.equal(found[[0, 2]], whole[[0, 2]])


def test_where_nothing_can_be_kept_it_is_compiled_each_time(monkeypatch):
    compiled = kernels._compiled

    def nowhere(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return compiled(**options)

    monkeypatch.setattr(kernels, "_compiled", nowhere)
    kernels._kernel.cache_clear()
    assert error("odd width") < TOLERANCE
    kernels._kernel.cache_clear()
