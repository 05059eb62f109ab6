import pytest
import torch
from torch.nn import functional as F

from learner import logprobs
from learner.logprobs import logprobs_and_entropy, no_tokens

TEMPERATURE = 0.7
CHUNKS = pytest.mark.parametrize(
    "settings",
    [{"chunk_tokens": 3, "kept_bytes": 0}, {"chunk_tokens": 3, "kept_bytes": 500}, {"chunk_tokens": 64}],
    ids=["computed-again", "some-kept", "kept"],
)


def toy_head(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden [10, 6], weight [9, 6], bias [9] with gradients, and targets [10]."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((10, 6), (9, 6), (9,))
    hidden, weight, bias = (torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes)
    return hidden, weight, bias, torch.randint(9, (10,), generator=generator)


def naive(hidden, weight, bias, targets, temperature=TEMPERATURE):
    log_softmax = (F.linear(hidden, weight, bias) / temperature).log_softmax(-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return torch.stack([log_softmax.gather(-1, targets[:, None])[:, 0], entropy], dim=-1)


def scores(hidden, weight, bias, targets, **settings):
    return logprobs_and_entropy(targets, **({"temperature": TEMPERATURE, "chunk_tokens": 64} | settings))(
        hidden, weight, bias
    )


def gradients(result, inputs):
    weights = torch.linspace(-1.0, 2.0, result.numel(), dtype=result.dtype).reshape(result.shape)
    return torch.autograd.grad((result * weights).sum(), inputs, retain_graph=True)


def test_by_hand():
    """Two tokens, logits (0, ln 3): probabilities 1/4 and 3/4."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [3.0]]).log().nan_to_num(neginf=0.0)
    found = scores(hidden, weight, None, torch.tensor([1]), temperature=1.0)
    entropy = -(0.25 * torch.tensor(0.25).log() + 0.75 * torch.tensor(0.75).log())
    assert torch.allclose(found, torch.stack([torch.tensor(0.75).log(), entropy])[None])


@CHUNKS
def test_gradients_are_right(settings):
    hidden, weight, bias, targets = toy_head()
    check = lambda h, w, b: scores(h, w, b, targets, **settings)  # noqa: E731
    assert torch.autograd.gradcheck(check, (hidden, weight, bias))
    assert torch.autograd.gradcheck(lambda h, w: check(h, w, None), (hidden, weight))


@CHUNKS
def test_equal_to_the_plain_formula(settings):
    hidden, weight, bias, targets = toy_head(torch.float32)
    found, expected = (
        scores(hidden, weight, bias, targets, **settings),
        naive(hidden, weight, bias, targets),
    )
    assert torch.allclose(found, expected, atol=1e-6)
    pairs = zip(gradients(found, (hidden, weight, bias)), gradients(expected, (hidden, weight, bias)), strict=True)
    assert all(torch.allclose(f, e, atol=1e-5) for f, e in pairs)


def test_the_comparison_finds_a_missing_temperature(monkeypatch):
    hidden, weight, bias, targets = toy_head()
    expected = gradients(naive(hidden, weight, bias, targets), (hidden, weight, bias))
    without = gradients(naive(hidden, weight, bias, targets, temperature=1.0), (hidden, weight, bias))
    assert not torch.allclose(expected[0], without[0], atol=1e-2)
    right = logprobs._grad_logits
    monkeypatch.setattr(logprobs, "_grad_logits", lambda *inputs: right(*inputs) * TEMPERATURE)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda h: scores(h, weight, bias, targets), (hidden,))


def test_the_comparison_finds_a_missing_entropy_gradient():
    hidden, weight, bias, targets = toy_head()
    found = gradients(scores(hidden, weight, bias, targets, entropy_gradient=False), (hidden,))
    expected = gradients(naive(hidden, weight, bias, targets), (hidden,))
    assert not torch.allclose(found[0], expected[0], atol=1e-2)


def test_entropy_without_gradient_leaves_the_logprobs_gradient_alone():
    hidden, weight, bias, targets = toy_head()
    found = scores(hidden, weight, bias, targets, entropy_gradient=False)
    expected = naive(hidden, weight, bias, targets)
    assert torch.allclose(found, expected)
    pairs = zip(gradients(found[:, :1], (hidden, weight)), gradients(expected[:, :1], (hidden, weight)), strict=True)
    assert all(torch.allclose(f, e) for f, e in pairs)


def test_a_weight_that_is_also_the_embedding_gets_both_gradients():
    _, weight, _, targets = toy_head()
    ids = torch.arange(10) % 9
    found = gradients(scores(weight[ids], weight, None, targets, chunk_tokens=3), (weight,))
    expected = gradients(naive(weight[ids], weight, None, targets), (weight,))
    assert torch.allclose(found[0], expected[0])


def test_logits_as_they_are_score_the_same():
    hidden, weight, bias, targets = toy_head()
    function = logprobs_and_entropy(targets, temperature=TEMPERATURE, chunk_tokens=4)
    found, expected = function(F.linear(hidden, weight, bias), None, None), function(hidden, weight, bias)
    assert torch.allclose(found, expected)
    assert torch.allclose(gradients(found, (hidden,))[0], gradients(expected, (hidden,))[0])


@CHUNKS
def test_half_precision_works_in_float32_inside(settings):
    hidden, weight, bias, targets = (x.detach() for x in toy_head(torch.float32))
    half = [x.bfloat16().requires_grad_() for x in (hidden, weight, bias)]
    found = scores(*half, targets, **settings)
    assert found.dtype == torch.float32
    wide = [x.detach().float().requires_grad_() for x in half]
    expected = naive(*wide, targets)
    assert torch.allclose(found, expected, atol=0.05)
    for f, e in zip(gradients(found, half), gradients(expected, wide), strict=True):
        assert f.dtype == torch.bfloat16
        assert (f.float() - e).abs().max() < 0.02 * e.abs().max()


@pytest.mark.parametrize(
    ("kept_bytes", "sizes"),
    [(0, [4, 4, 2, 4, 4, 2]), (4 * 9 * 8, [4, 4, 2, 4, 2]), (10 * 9 * 8, [4, 4, 2])],
    ids=["none", "one-chunk", "all"],
)
def test_what_is_kept_is_not_computed_again(monkeypatch, kept_bytes, sizes):
    """Ten tokens, nine numbers of eight bytes each; forward, then what is missing backward, never more than a chunk."""
    hidden, weight, bias, targets = toy_head()
    seen: list[int] = []
    right = logprobs._log_softmax
    monkeypatch.setattr(logprobs, "_log_softmax", lambda h, *rest: (seen.append(h.shape[0]), right(h, *rest))[1])
    scores(hidden, weight, bias, targets, chunk_tokens=4, kept_bytes=kept_bytes).sum().backward()
    assert seen == sizes


def test_a_second_backward_pass_does_not_see_what_the_first_wrote():
    hidden, weight, bias, targets = toy_head()
    found = scores(hidden, weight, bias, targets)
    first, second = (gradients(found, (hidden, weight, bias)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@CHUNKS
def test_rows_at_a_time_change_nothing(monkeypatch, settings):
    inputs, targets = toy_head()[:3], toy_head()[3]
    whole = scores(*inputs, targets, **settings)
    expected = gradients(whole, inputs)
    monkeypatch.setattr(logprobs, "_BLOCK_BYTES", 2 * 9 * 8)
    blocks = scores(*inputs, targets, **settings)
    assert torch.allclose(blocks, whole, rtol=1e-12)
    assert all(torch.allclose(f, e, rtol=1e-12) for f, e in zip(gradients(blocks, inputs), expected, strict=True))


def test_no_tokens():
    assert no_tokens(torch.ones(3, 2), None, None).shape == (3, 0)
