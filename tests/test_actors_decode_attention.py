"""The Triton kernels of decoding against torch in float64.  On a CPU Triton's interpreter runs them, in one process."""

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are made
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (it comes with torch for GPUs)", allow_module_level=True)

from actors import decode_attention as kernels
from tests.decode_cases import SHAPES, inputs, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
"""The interpreter computes with numpy, which has no bfloat16."""
TOLERANCE = {torch.float32: 2e-6, HALF: 1e-2}


def on_device(name, dtype=torch.float32):
    tensors, positions = inputs(name, dtype)
    return [one.to(DEVICE) for one in tensors], positions.to(DEVICE)


def error(name, dtype=torch.float32, *, reference_softcap=None, **rule):
    (query, keys, values), positions = on_device(name, dtype)
    scaling = query.shape[-1] ** -0.5
    found = kernels.decode_attention(query, keys, values, positions, window=keys.shape[2], scaling=scaling, **rule)
    expected = reference(query, keys, values, positions, scaling=scaling, **rule | (reference_softcap or {}))
    return float((found.cpu().double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_equals_float64(name, dtype):
    assert error(name, dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("rule", [{"sliding_window": 6}, {"softcap": 2.0}, {"sliding_window": 70, "softcap": 5.0}])
def test_windows_and_caps(rule):
    assert error("few rows, long", **rule) < TOLERANCE[torch.float32]


def test_a_rule_that_is_left_out_is_seen():
    """Planted bug: a reference with another cap, as a kernel without one would be."""
    assert error("few rows, long", softcap=2.0, reference_softcap={"softcap": 50.0}) > 1e-2


@pytest.mark.parametrize("programs", [1, 64, 4096])
def test_however_the_keys_are_divided(programs, monkeypatch):
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    assert error("few rows, long") < TOLERANCE[torch.float32]
    assert error("few rows, long", sliding_window=100) < TOLERANCE[torch.float32]


def test_lost_parts_are_seen(monkeypatch):
    """Planted bug: a window that is too short for a row's keys makes fewer parts, and none is lost; a part is."""
    (query, keys, values), positions = on_device("few rows, long")
    whole = kernels.decode_attention(query, keys, values, positions, window=400, scaling=0.1)
    positions[-1] -= 64
    fewer = kernels.decode_attention(query, keys, values, positions, window=400, scaling=0.1)
    assert (whole - fewer)[-1].abs().max() > 1e-3
    assert torch.equal(whole[0], fewer[0])
