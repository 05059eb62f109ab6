"""Bursts: several tokens between two looks of the host, and prompts in batches, are what one at a time is."""

import logging

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from actors.bursts import BurstDecoder, _Program
from actors.engine import SamplingParams
from actors.sampling import draw, sample, uniforms, uniforms_on_device
from actors.torch_engine import CPU_PACE, Pace
from tests.engine_toys import (
    EOS,
    PROMPTS,
    assert_same_bits,
    build,
    every_architecture,
    make_engine,
    plain_logprobs,
    request,
    serve,
    update,
    weights,
)


def requests():
    """More samples than rows; some end early, some greedy, some at another temperature, one with a stop string."""
    return [
        request("a", PROMPTS["a"], 5),
        request("b", PROMPTS["b"], 3, temperature=0.0),
        request("c", PROMPTS["c"], 4, temperature=0.7, stop=("b",)),
        request("d", PROMPTS["d"], 3, forced=(1, 9, 4)),
    ]


def bursting(name="llama", steps=4, prefill_tokens=0, **settings):
    pace = Pace(steps=steps, prefill_tokens=prefill_tokens)
    return make_engine(name, eos=(EOS, 3, 17), pace=pace, **settings)


def one_by_one(name="llama", **settings):
    return make_engine(name, eos=(EOS, 3, 17), pace=CPU_PACE, **settings)


def test_uniforms_on_the_device_have_the_same_bits():
    random = np.random.default_rng(0)
    seeds = random.integers(0, 2**63, 1000)
    indices, positions = random.integers(0, 64, 1000), random.integers(0, 4096, 1000)
    expected = uniforms(seeds.astype(np.uint64), indices, positions)
    found = uniforms_on_device(*map(torch.from_numpy, (seeds, indices, positions)))
    assert found.numpy().tobytes() == expected.tobytes()
    # Planted bug: a shift that repeats the sign gives other numbers.
    assert not torch.equal(torch.from_numpy(seeds) >> 3, (torch.from_numpy(seeds) - 2**63) >> 3)


def test_draw_is_sample_without_truncation():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 1000, generator=generator) * 3
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    temperatures = [(0.0, 0.7, 1.0, 1.3)[row % 4] for row in range(64)]
    params = [SamplingParams(max_new_tokens=1, temperature=temperature) for temperature in temperatures]
    expected = sample(logits, params, uniform.numpy())
    found = draw(logits, torch.tensor(temperatures), uniform)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@every_architecture
@pytest.mark.parametrize("steps", [2, 5])
def test_same_bits_as_one_token_at_a_time(name, steps):
    expected, found = serve(one_by_one(name), *requests()), serve(bursting(name, steps), *requests())
    assert len(found) == len(expected) == 15
    for key, completion in expected.items():
        assert_same_bits(completion, found[key])
    assert {completion.finish_reason for completion in expected.values()} >= {"eos", "length"}


def test_longer_than_any_response():
    expected, found = serve(one_by_one(), *requests()), serve(bursting(steps=40), *requests())
    for key, completion in expected.items():
        assert_same_bits(completion, found[key])


def test_responses_that_fill_all_positions():
    """The last tokens of a burst would lie behind the last position: rows that have ended stay within their slot."""
    asked = [request("long", range(20), 2, max_new_tokens=80), request("short", [1, 2], 3, max_new_tokens=3)]
    expected, found = (
        serve(make_engine("gpt2"), *asked),
        serve(make_engine("gpt2", pace=Pace(steps=7, prefill_tokens=0)), *asked),
    )
    for key, completion in expected.items():
        assert_same_bits(completion, found[key])


def test_an_update_between_bursts_is_on_the_tokens():
    engine = bursting(steps=4)
    engine.submit([request("a", PROMPTS["a"], 2, forced=(12, 12))])
    done = engine.step()
    update(engine, 7, weights("llama", 1), mode="keep")
    while engine.has_work:
        done += engine.step()
    # the first token comes from the prefill
    assert [completion.policy_versions.tolist() for completion in done] == [[-1] * 5 + [7] * 7] * 2


def test_truncated_distributions_go_one_by_one(monkeypatch):
    monkeypatch.setattr(BurstDecoder, "run", lambda *_: pytest.fail("a burst knows no truncation"))
    asked = request("a", PROMPTS["a"], 2, top_k=3)
    found, expected = serve(bursting(), asked), serve(one_by_one(), asked)
    for key, completion in expected.items():
        assert_same_bits(completion, found[key])


def test_what_is_drawn_for_nothing_is_counted():
    engine = bursting(steps=5)
    serve(engine, request("a", PROMPTS["a"], 1, forced=(3,)))
    stats = engine.stats()
    assert (stats.num_decode_steps, stats.num_decode_rows, stats.num_decode_tokens) == (5, 20, 2)


@pytest.mark.parametrize("prefill_tokens", [32, 96, 4096])
def test_prompts_in_batches(prefill_tokens):
    model = build("llama")
    done = serve(bursting(prefill_tokens=prefill_tokens), *requests())
    assert len(done) == 15
    for (key, _), completion in done.items():
        temperature = {"c": 0.7}.get(key, 1.0)
        expected = plain_logprobs(model, PROMPTS[key], completion.response_ids, temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-5)


def test_batches_of_prompts_stay_within_their_bound():
    engine = bursting(prefill_tokens=64)  # 16 + 16 tokens padded to one width, or one prompt of 32
    sizes = []
    together = engine._prefiller.together
    engine._prefiller.together = lambda prompts: sizes.append([len(p) for p in prompts]) or together(prompts)
    serve(engine, *[request(name, [1] * length) for name, length in zip("abcdef", (5, 16, 17, 30, 3, 3), strict=True)])
    assert sizes[0] == [5, 16]
    assert sorted(length for batch in sizes for length in batch) == [3, 3, 5, 16, 17, 30]


class Questions(TorchDispatchMode):
    """Notes what makes the host wait for the device, which a CUDA graph cannot hold."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.NAMES:
            self.asked.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def asked_in_a_step(engine, monkeypatch):
    questions, advance = Questions(), _Program._advance

    def watched(program):
        with questions:
            advance(program)

    monkeypatch.setattr(_Program, "_advance", watched)
    serve(engine, *requests())
    return questions.asked


@every_architecture
def test_a_step_asks_the_host_nothing(name, monkeypatch):
    assert asked_in_a_step(bursting(name), monkeypatch) == []


def test_a_question_is_seen(monkeypatch):
    """Planted bug: a row's end looked at within the step."""

    def asking(*arguments):
        tokens, logprobs = draw(*arguments)
        return tokens, logprobs if bool((tokens == EOS).any()) else logprobs.clone()

    monkeypatch.setattr("actors.bursts.draw", asking)
    assert "is_nonzero" in asked_in_a_step(bursting(), monkeypatch)


class Replay:
    """A graph's twin: what was captured runs again as it is."""

    def __init__(self, program):
        self.replay = program._advance


def with_graphs(engine, capture, monkeypatch):
    monkeypatch.setattr(_Program, "capture", capture)
    engine._bursts._has_graphs = True
    return engine


def test_buckets_of_rows_and_windows_change_no_bit(monkeypatch):
    captured = []

    def capture(program, pool):
        program._advance()  # the run before a capture
        program._graph = Replay(program)
        captured.append((program._counters.shape[1], program._window))
        return pool

    engine = with_graphs(bursting(max_rows=12), capture, monkeypatch)
    found, expected = serve(engine, *requests()), serve(one_by_one(max_rows=12), *requests())
    for key, completion in expected.items():
        assert_same_bits(completion, found[key])
    assert len(set(captured)) == len(captured), "each size once"
    assert {rows for rows, _ in captured} <= {4, 8, 12}
    before = len(captured)
    serve(engine, request("again", range(20), 1, max_new_tokens=60))
    assert len(captured) > before, "memory for longer samples is other memory"


def test_what_cannot_be_captured_runs_operation_by_operation(monkeypatch, caplog):
    def capture(program, pool):
        program._advance()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    engine = with_graphs(bursting(), capture, monkeypatch)
    with caplog.at_level(logging.WARNING):
        found = serve(engine, *requests())
    for key, completion in serve(one_by_one(), *requests()).items():
        assert_same_bits(completion, found[key])
    assert [record.message for record in caplog.records if "captured" in record.message] == [
        "the model's steps cannot be captured as a CUDA graph (operation not permitted when stream is capturing): "
        "tokens are decoded operation by operation, several times slower where the model is small"
    ]
