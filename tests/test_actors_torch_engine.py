"""Contract of the torch engine: what a sample is, on every architecture and in any company."""

import itertools

import numpy as np
import pytest
import torch

from actors.prefill import Prefiller
from actors.slots import AttentionRule, Continuation
from tests.engine_toys import (
    EOS,
    PROMPTS,
    assert_same_bits,
    build,
    every_architecture,
    make_engine,
    plain_logprobs,
    request,
    run,
    serve,
    update,
    weights,
)


@every_architecture
def test_greedy_equals_generate(name):
    model = build(name)
    done = serve(make_engine(name), *[request(key, prompt, temperature=0.0) for key, prompt in PROMPTS.items()])
    for key, prompt in PROMPTS.items():
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=37
        )[0, len(prompt) :]
        assert done[key, 0].response_ids.tolist() == expected.tolist()
        assert done[key, 0].finish_reason == "length"


@every_architecture
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_equal_a_plain_forward(name, temperature):
    model = build(name)
    requests = [request(key, prompt, 3, temperature=temperature) for key, prompt in PROMPTS.items()]
    done = serve(make_engine(name), *requests)
    assert len(done) == 12
    for (key, _), completion in done.items():
        expected = plain_logprobs(model, PROMPTS[key], completion.response_ids, temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    # Planted bug: log-probs without the temperature fail the same check.
    if temperature != 1.0:
        wrong = plain_logprobs(model, PROMPTS[key], completion.response_ids)
        assert np.abs(completion.logprobs - wrong).max() > 1e-2


@pytest.mark.parametrize("name", ["mistral-window", "gemma2-window-softcap", "gemma3-window"])
def test_a_hook_without_window_or_softcap_is_caught(name, monkeypatch):
    """Planted bug: the plain rule is silently wrong on these models, and the check above sees it."""
    model, attend = build(name), Continuation.attend

    def plain(self, layer, query, key, value, rule):
        bare = AttentionRule(scaling=rule.scaling, sliding_window=None, softcap=None)
        return attend(self, layer, query, key, value, bare)

    monkeypatch.setattr(Continuation, "attend", plain)
    completion = serve(make_engine(name), request("c", PROMPTS["c"]))["c", 0]
    expected = plain_logprobs(model, PROMPTS["c"], completion.response_ids)
    assert np.abs(completion.logprobs - expected).max() > 1e-2


@every_architecture
def test_same_bits_alone_and_in_any_company(name):
    requests = [request(key, prompt, 3, max_new_tokens=10 + len(prompt)) for key, prompt in PROMPTS.items()]
    together = serve(make_engine(name, max_rows=12), *requests)
    engine = make_engine(name, max_rows=8)  # other rows, other order, other windows, used before
    backwards = serve(engine, *reversed(requests))
    for item in requests:
        alone = serve(engine, item)
        for index in range(3):
            key = (item.request_id, index)
            assert_same_bits(together[key], alone[key])
            assert_same_bits(together[key], backwards[key])
    assert "batch_invariant" in engine.capabilities


def test_company_check_sees_a_shared_generator():
    """Planted bug: draws that depend on the batch (here: on the row) break the equality."""
    engine = make_engine()
    count = itertools.count()
    engine._hook = lambda logits, hidden, ids: (
        logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(next(count)))
    )
    together = serve(engine, request("d", PROMPTS["d"], 4), request("a", PROMPTS["a"], 2))
    alone = serve(engine, request("a", PROMPTS["a"], 2))
    assert together["a", 0].logprobs.tobytes() != alone["a", 0].logprobs.tobytes()


@every_architecture
def test_shared_prompt_equals_separate_prompts(name):
    prompt = PROMPTS["b"]
    shared = serve(make_engine(name), request("x", prompt, 4, max_new_tokens=20))
    engine = make_engine(name)
    for index in range(4):
        # The engine prefills for the last sample alone, after the others were dropped.
        engine.submit([request("x", prompt, index + 1, max_new_tokens=20)])
        separate = run(engine)["x", index]
        assert_same_bits(shared["x", index], separate)
    assert len({tuple(completion.response_ids) for completion in shared.values()}) == 4  # samples differ


LONG = [(index * index) % 37 for index in range(70)]
"""Two whole chunks of 32 tokens and a rest."""


@every_architecture
def test_what_prompts_share_is_computed_once_and_has_the_same_bits(name):
    engine = make_engine(name)
    others = {"e": [*LONG[:66], 1, 2, 3], "f": LONG[:64], "g": LONG[:40], "h": [5, *LONG[:60]]}
    known = {"e": 64, "f": 32, "g": 32, "h": 0}  # never all of a prompt, whose last token must be computed
    serve(engine, request("long", LONG))
    for key, prompt in others.items():
        before = engine.stats().num_prefill_tokens
        after_another = serve(engine, request(key, prompt, 2))
        assert engine.stats().num_prefill_tokens - before == len(prompt) - known[key]
        alone = serve(make_engine(name), request(key, prompt, 2))
        for index in range(2):
            assert_same_bits(after_another[key, index], alone[key, index])


@pytest.mark.parametrize("forgets", [True, False], ids=["", "planted bug"])
def test_new_weights_compute_a_prompt_anew(forgets, monkeypatch):
    if not forgets:
        monkeypatch.setattr(Prefiller, "forget", lambda prefiller: None)
    engine = make_engine()
    serve(engine, request("x", LONG))
    update(engine, 1, weights("llama", 7))
    completion = serve(engine, request("x", LONG))["x", 0]
    expected = plain_logprobs(build("llama", 7), LONG, completion.response_ids)
    assert (np.abs(completion.logprobs - expected).max() < 1e-4) == forgets


def test_slots_are_refilled_at_once_and_kept_dense():
    engine = make_engine(max_rows=4)
    engine.submit([request("a", PROMPTS["a"], 3, forced=(2, 9, 4)), request("b", PROMPTS["b"], 3, forced=(8, 1, 5))])
    live = []
    done = {}
    while engine.has_work:
        done |= {(c.request_id, c.sample_index): c for c in engine.step()}
        live.append(engine.stats().num_live_rows)
    lengths = {key: len(completion.response_ids) for key, completion in done.items()}
    assert lengths == dict(zip([(k, i) for k in "ab" for i in range(3)], (2, 9, 4, 8, 1, 5), strict=True))
    # Step 1: a0 a1 a2 b0 start (length 1) and decode; a0 ends at 2.  Step 2: b1 starts and ends at once, b2 takes the
    # slot.  Then a2 ends at length 4, b2 at 5, b0 at 8, a1 at 9.
    assert live == [3, 4, 3, 3, 2, 2, 1, 0]
    stats = engine.stats()
    assert stats.num_prefill_tokens == 5 + 11  # each prompt once
    assert stats.num_decode_tokens == sum(lengths.values()) - 6  # first tokens come from the prefill
    assert stats.num_decode_rows == 4 * stats.num_decode_steps
    assert stats.num_completions == 6


def test_partially_admitted_group_continues_while_others_wait():
    engine = make_engine(max_rows=4)
    done = serve(engine, request("a", PROMPTS["a"], 11), request("b", PROMPTS["b"], 2))
    reference = serve(make_engine(max_rows=16), request("b", PROMPTS["b"], 2), request("a", PROMPTS["a"], 11))
    assert len(done) == 13
    for key, completion in done.items():
        assert_same_bits(completion, reference[key])
    assert engine.stats().num_prefill_tokens == 5 + 11


def test_eos_is_included_exactly_once():
    eos = {1, 5, 9, 17, EOS}
    done = serve(make_engine(eos=eos), *[request(key, prompt, 8, max_new_tokens=40) for key, prompt in PROMPTS.items()])
    ended = [c for c in done.values() if c.finish_reason == "eos"]
    assert len(ended) > 20
    for completion in done.values():
        found = [token in eos for token in completion.response_ids.tolist()]
        assert sum(found) == (completion.finish_reason == "eos")
        assert not any(found[:-1])
        assert len(completion.logprobs) == len(completion.policy_versions) == len(found)
    free = serve(make_engine(), request("a", PROMPTS["a"], 8, max_new_tokens=40))
    for index in range(8):  # ending early changes nothing before the end
        length = len(done["a", index].response_ids)
        assert free["a", index].response_ids[:length].tolist() == done["a", index].response_ids.tolist()


def test_stop_string_ends_with_the_token_that_completes_it():
    free = serve(make_engine(), request("a", PROMPTS["a"], 6, max_new_tokens=40))
    text = free["a", 2].response_text
    stop = (text[10:13], "zzzz")
    done = serve(make_engine(), request("a", PROMPTS["a"], 6, max_new_tokens=40, stop=stop))
    for index in range(6):
        whole, cut = free["a", index].response_text, done["a", index].response_text
        ends = [whole.index(string) + len(string) for string in stop if string in whole]
        expected = whole[: min(ends)] if ends else whole
        assert cut == expected
        assert done["a", index].finish_reason == ("stop" if ends else "length")
    assert done["a", 2].finish_reason == "stop"


def test_response_text_has_no_special_tokens():
    def prefer(logits, hidden, ids):
        logits = torch.full_like(logits, -50.0)
        logits[:, [0, EOS]] = torch.tensor([0.0, 1.0])
        return logits

    engine = make_engine(eos=[EOS], logits_hook=prefer)
    completion = serve(engine, request("a", [3], 8))["a", 0]
    assert completion.response_ids[-1] == EOS
    assert completion.response_text == "a" * (len(completion.response_ids) - 1)


def test_logits_hook_sees_every_draw_and_its_result_is_recorded():
    seen = []

    def only_even(logits, hidden, ids):
        seen.extend(ids)
        logits = logits.clone()
        logits[:, 1::2] = -torch.inf
        return logits

    done = serve(make_engine(logits_hook=only_even), request("a", PROMPTS["a"], 2), request("b", PROMPTS["b"]))
    assert all((completion.response_ids % 2 == 0).all() for completion in done.values())
    assert sorted(seen) == ["a"] * 24 + ["b"] * 12
    model = build("llama")
    free = plain_logprobs(model, PROMPTS["a"], done["a", 0].response_ids)
    assert (done["a", 0].logprobs > free).all()  # renormalised over half of the tokens


@every_architecture
@pytest.mark.parametrize("shift", [0, 1])
def test_logits_hook_gets_the_states_its_logits_are_made_of(name, shift):
    """From a prefill that samples share, and from decoding; the planted twin takes its neighbour's state."""
    engine = make_engine(name)
    head = engine._model.get_output_embeddings()
    cap = getattr(engine._model.config, "final_logit_softcapping", None)
    equal = []

    def compare(logits, hidden, ids):
        made = head(hidden.roll(shift, dims=0))
        made = made if cap is None else cap * torch.tanh(made / cap)
        equal.append(torch.allclose(made, logits, atol=1e-4))
        return logits

    engine._hook = compare
    guided = serve(engine, request("a", PROMPTS["a"], 2), request("b", PROMPTS["b"]))
    assert len(equal) == 2 + 11  # two prefills, then all rows together
    assert all(equal[:2])  # the rows of a prefill are alike
    assert all(equal) == (not shift)
    free = serve(make_engine(name), request("a", PROMPTS["a"], 2), request("b", PROMPTS["b"]))
    for key in guided:  # a hook that changes nothing changes no bit
        assert_same_bits(guided[key], free[key])
