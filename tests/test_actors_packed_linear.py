"""Packed products: right, the same in any company, taken anew with every version, and refused where they are not so."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actors import packed_linear, torch_engine
from actors.packed_linear import PackedLinear, pack, repack
from actors.scorer import ScoringLinear
from tests.engine_toys import PROMPTS, build, make_engine, plain_logprobs, request, serve, update, weights

SHAPES = [(64, 64), (192, 576), (576, 1536), (40, 96), (23, 24), (1024, 64)]


def layer(shape, *, bias=False) -> nn.Linear:
    generator = torch.Generator().manual_seed(shape[0])
    built = nn.Linear(shape[1], shape[0], bias=bias)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(generator=generator)
    return built


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_pieces", [1, 3])
@torch.no_grad()
def test_products_are_right_and_a_row_keeps_its_bits_in_any_company(shape, bias, num_pieces, monkeypatch):
    rows_of_a_piece = -(-shape[0] // num_pieces)
    monkeypatch.setattr(packed_linear, "_PIECE_BYTES", rows_of_a_piece * shape[1] * 4)
    linear = layer(shape, bias=bias)
    rows = torch.randn(96, shape[1], generator=torch.Generator().manual_seed(1))
    expected = linear(rows)
    assert pack(nn.ModuleList([linear])) == 1
    assert type(linear) is PackedLinear
    assert len(linear.product.packed) == num_pieces
    found = linear(rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            for count in (4, 5, 8, 13, 32, 96):
                assert torch.equal(linear(rows[:count]), found[:count])
                assert torch.equal(linear(rows[-count:, None])[:, 0], found[-count:])
    finally:
        torch.set_num_threads(threads)


class Attention(nn.Module):
    """Three layers that transformers calls with one input, usually."""

    def __init__(self, sizes=(64, 16, 24), biases=(True, True, True)):
        super().__init__()
        layers = [layer((size, 32), bias=bias) for size, bias in zip(sizes, biases, strict=True)]
        self.q_proj, self.k_proj, self.v_proj = layers

    def forward(self, first, second=None):
        second = first if second is None else second
        return self.q_proj(first), self.k_proj(second), self.v_proj(first)

    @property
    def num_products(self):
        return len({id(one.product) for one in self.children()})


def rows_of(count, seed=1):
    return torch.randn(count, 1, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_layers_with_one_input_are_one_product(has_bias):
    attention, rows = Attention(biases=(has_bias,) * 3), rows_of(32)
    expected = attention(rows)
    assert pack(attention) == 3
    assert attention.num_products == 1
    found = attention(rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for count in (4, 5, 12):
        for part, whole in zip(attention(rows[-count:]), found, strict=True):
            assert torch.equal(part, whole[-count:])
    for one in attention.children():
        one.weight.mul_(2.0)
        if has_bias:
            one.bias.mul_(2.0)
    repack(attention)
    for part, whole in zip(attention(rows), found, strict=True):
        assert torch.equal(part, 2.0 * whole)


def keep_forever(product, part, input):
    """Planted bug: what was computed for an input stays, whatever becomes of it."""
    if product._waiting is None or product._waiting[0] is not input:
        results = packed_linear._product(input, product.packed, product._bias).split(product._sizes, -1)
        product._waiting = input, dict(enumerate(results))
    return product._waiting[1][part]


@pytest.mark.parametrize("take", [packed_linear.PackedProduct.take, keep_forever], ids=["", "planted bug"])
@torch.no_grad()
def test_nothing_rests_on_the_input_being_the_same(take, monkeypatch):
    attention, first, second = Attention(), rows_of(8, 1), rows_of(8, 2)
    different, changed = attention(first, second), attention(2.0 * first)
    pack(attention)
    monkeypatch.setattr(packed_linear.PackedProduct, "take", take)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(attention(first, second), different, **close)
    attention(first)
    first.mul_(2.0)  # in place, as whoever keeps one buffer for all steps would
    is_right = all(torch.allclose(*pair, **close) for pair in zip(attention(first), changed, strict=True))
    assert is_right == (take is not keep_forever)


@pytest.mark.parametrize(
    ("biases", "piece_bytes"),
    [
        pytest.param((True, False, False), 2**24, id="a bias of one alone"),
        pytest.param((True, True, True), 2**12, id="larger than a piece"),
    ],
)
@torch.no_grad()
def test_layers_that_do_not_fit_together_are_packed_one_by_one(biases, piece_bytes, monkeypatch):
    monkeypatch.setattr(packed_linear, "_PIECE_BYTES", piece_bytes)
    attention = Attention(biases=biases)
    expected = attention(rows_of(8))
    assert pack(attention) == 3
    assert attention.num_products == 3
    torch.testing.assert_close(attention(rows_of(8)), expected, rtol=1e-4, atol=1e-4)


def test_layers_that_are_not_plain_float32_stay_as_they_are():
    half, taken = layer((64, 64)).bfloat16(), layer((64, 64))
    taken.__class__ = ScoringLinear
    model = nn.ModuleList([half, taken, nn.LayerNorm(64), nn.Embedding(8, 64)])
    assert pack(model) == 0
    assert type(half) is nn.Linear


@pytest.mark.parametrize("piece_bytes", [2**27, 2**12])
@torch.no_grad()
def test_a_changed_weight_counts_from_repacking_on_and_takes_no_new_memory(piece_bytes, monkeypatch):
    monkeypatch.setattr(packed_linear, "_PIECE_BYTES", piece_bytes)
    linear, rows = layer((64, 64)), torch.ones(4, 64)
    pack(nn.ModuleList([linear]))
    before, packed = linear(rows), list(linear.product.packed)
    linear.weight.mul_(2.0)
    assert torch.equal(linear(rows), before)
    repack(nn.ModuleList([linear]))
    assert torch.equal(linear(rows), 2.0 * before)
    assert all(now is then for now, then in zip(linear.product.packed, packed, strict=True))


@torch.no_grad()
def test_a_model_that_stays_as_it_is_gives_its_plain_weights_back():
    linear, rows = layer((64, 64), bias=True), torch.ones(4, 64)
    expected = linear(rows)
    pack(nn.ModuleList([linear]), is_final=True)
    torch.testing.assert_close(linear(rows), expected)
    assert linear.weight.untyped_storage().nbytes() == 4
    assert linear.weight.shape == (64, 64)
    assert linear.weight.isnan().all()  # whoever still reads it must notice


@pytest.mark.parametrize(
    "flaw",
    [
        pytest.param(lambda result: result + 1e-6 * len(result), id="depends on company"),
        pytest.param(lambda result: 1.01 * result, id="wrong"),
    ],
)
@torch.no_grad()
def test_products_with_a_flaw_are_not_used(flaw, monkeypatch):
    product = packed_linear._product
    monkeypatch.setattr(packed_linear, "_product", lambda *arguments: flaw(product(*arguments)))
    linear = layer((64, 64))
    assert pack(nn.ModuleList([linear])) == 0
    assert type(linear) is nn.Linear


@pytest.mark.parametrize("repacks", [True, False], ids=["", "planted bug"])
def test_an_engine_samples_with_the_weights_of_its_version(repacks, monkeypatch):
    if not repacks:
        monkeypatch.setattr(torch_engine, "repack", lambda model: None)
    engine = make_engine("llama", seed=0)
    update(engine, 1, weights("llama", 7))
    completion = serve(engine, request("c", PROMPTS["c"]))["c", 0]
    expected = plain_logprobs(build("llama", 7), PROMPTS["c"], completion.response_ids)
    assert (np.abs(completion.logprobs - expected).max() < 1e-4) == repacks


def order_of_weights(linear, capfd) -> str:
    """Return how oneDNN says that the weight of a product lies in memory."""
    capfd.readouterr()
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        linear(torch.ones(16, linear.in_features))
    said = [line for line in capfd.readouterr().out.splitlines() if ",exec," in line and "wei:" in line]
    return next(part for part in said[-1].replace(" ", ",").split(",") if part.startswith("wei:"))


@pytest.mark.parametrize("reordered", [packed_linear._reordered, Tensor.to_mkldnn], ids=["", "planted bug"])
@torch.no_grad()
def test_packing_again_keeps_the_order_that_products_read_fastest(reordered, monkeypatch, capfd):
    linear = layer((1536, 576))
    pack(nn.ModuleList([linear]), is_final=False)
    linear.product.packed = packed_linear._pack(linear.weight)  # as it was the first time
    first = order_of_weights(linear, capfd)
    monkeypatch.setattr(packed_linear, "_reordered", reordered)
    repack(nn.ModuleList([linear]))
    assert (order_of_weights(linear, capfd) == first) == (reordered is not Tensor.to_mkldnn)
