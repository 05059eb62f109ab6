"""The torch engine's state: new weights, refused requests, memory, aborts, divergence."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig

from actors.engine import EngineError
from actors.packed_linear import PackedLinear
from actors.torch_engine import TorchEngine
from actors.weights import WeightError
from tests.engine_toys import (
    COMMON,
    PROMPTS,
    assert_same_bits,
    build,
    every_architecture,
    make_engine,
    plain_logprobs,
    request,
    run,
    serve,
    tokenizer,
    update,
    weights,
)


@every_architecture
def test_load_in_place_equals_a_fresh_engine(name):
    engine, fresh = make_engine(name), make_engine(name, seed=1)
    item = request("a", PROMPTS["a"], 2)
    before = serve(engine, item)
    pointers = [parameter.data_ptr() for parameter in engine._model.parameters()]
    update(engine, 5, weights(name, 1))
    assert pointers == [parameter.data_ptr() for parameter in engine._model.parameters()]
    after, expected = serve(engine, item), serve(fresh, item)
    for index in range(2):
        assert_same_bits(after["a", index], expected["a", index])
        assert before["a", index].logprobs.tobytes() != after["a", index].logprobs.tobytes()
        assert set(after["a", index].policy_versions) == {5}
    assert set(before["a", 0].policy_versions) == {-1}


@pytest.mark.parametrize("mode", ["keep", "reprefill"])
def test_update_in_flight_records_versions_per_token(mode):
    engine = make_engine(max_rows=4)
    update(engine, 0, weights("llama", 0))
    engine.submit([request("a", PROMPTS["a"], 2), request("b", PROMPTS["b"], 3)])
    for _ in range(4):
        engine.step()
    update(engine, 1, weights("llama", 1), mode)
    done = run(engine)
    old, new = build("llama", 0), build("llama", 1)
    split = 5  # the first token and four decoded ones
    for key in [("a", 0), ("a", 1), ("b", 0), ("b", 1)]:
        completion, prompt = done[key], PROMPTS[key[0]]
        assert completion.policy_versions.tolist() == [0] * split + [1] * (12 - split)
        by_old = plain_logprobs(old, prompt, completion.response_ids)
        by_new = plain_logprobs(new, prompt, completion.response_ids)
        np.testing.assert_allclose(completion.logprobs[:split], by_old[:split], atol=1e-4)
        gap = np.abs(completion.logprobs[split:] - by_new[split:]).max()
        assert (gap < 1e-4) == (mode == "reprefill")  # keep goes on with the old keys and values
    # The sample of b that started after the update used no cached prompt of the old weights.
    late = done["b", 2]
    assert late.policy_versions.tolist() == [1] * 12
    np.testing.assert_allclose(late.logprobs, plain_logprobs(new, PROMPTS["b"], late.response_ids), atol=1e-4)


def test_drain_update_refuses_live_requests():
    engine = make_engine()
    engine.submit([request("a", PROMPTS["a"])])
    engine.begin_update(0, "drain")  # only waiting: fine
    engine.load(weights("llama", 0))
    engine.end_update()
    engine.step()
    with pytest.raises(EngineError, match="no request must be live"):
        engine.begin_update(1, "drain")


def test_an_update_must_bring_every_tensor_once():
    engine = make_engine()
    named = weights("llama", 1)
    assert "lm_head.weight" not in engine.weight_shapes()  # tied, so named once
    assert engine.weight_shapes()["model.norm.weight"] == ((32,), "float32")
    engine.begin_update(1, "drain")
    with pytest.raises(WeightError, match=r"model\.norms\.weight.*nearest is 'model\.norm\.weight'"):
        engine.load([("model.norms.weight", torch.zeros(32))])
    with pytest.raises(WeightError, match=r"model\.norm\.weight.*must have shape \(32,\), got \(31,\)"):
        engine.load([("model.norm.weight", torch.zeros(31))])
    engine.load(named[1:])
    with pytest.raises(WeightError, match=r"missing 'model\.embed_tokens\.weight'"):
        engine.end_update()
    with pytest.raises(EngineError, match="between updates"):
        engine.step()
    with pytest.raises(WeightError, match="once"):
        engine.load(named[1:2])
    update(engine, 2, named)  # a second begin starts over
    assert engine.version == 2


def test_requests_that_can_never_be_served_are_refused():
    engine = make_engine("gpt2")
    engine.submit([request("a", PROMPTS["a"])])
    refused = {
        "unique while in flight": request("a", [1]),
        "at least one token": request("e", []),
        "must fit into 100 tokens, got 20 \\+ 81": request("c", PROMPTS["c"], max_new_tokens=81),
        "temperature and top_k": request("t", [1], temperature=-1.0),
        "num_samples and max_new_tokens": request("n", [1], 0),
        "forced_lengths": request("f", [1], 2, forced=(1,)),
        "stop strings": request("s", [1], stop=("",)),
    }
    for message, item in refused.items():
        with pytest.raises(ValueError, match=message):
            engine.submit([request("fine", [1]), item])
    assert list(run(engine)) == [("a", 0)]  # one bad request refuses its whole call, and nothing else
    longest = serve(engine, request("c", list(range(30)) * 3, max_new_tokens=10))
    assert len(longest["c", 0].response_ids) == 10  # padding past the last position embedding does no harm


def test_short_max_len_and_few_rows_are_refused():
    with pytest.raises(ValueError, match="must fit into 16 tokens"):
        make_engine(max_len=16).submit([request("a", PROMPTS["a"])])
    with pytest.raises(ValueError, match="multiple of 4"):
        make_engine(max_rows=6)


def test_unknown_attention_keyword_is_refused():
    config = GptOssConfig(**COMMON, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    engine = TorchEngine(model, tokenizer(), max_rows=4, eos_ids=frozenset())
    engine.submit([request("a", [1, 2])])
    with pytest.raises(ValueError, match=r"'s_aux' \(GptOssAttention\)"):
        engine.step()


def test_memory_grows_for_a_longer_request_and_sleep_releases_it():
    engine = make_engine()
    short = request("a", PROMPTS["a"], 2)
    engine.submit([short])
    engine.step()
    small = engine.stats().kv_bytes
    assert small == 2 * 2 * 8 * 2 * 32 * 8 * 4  # k and v, layers, slots, kv heads, positions, head_dim, bytes
    done = serve(engine, request("c", PROMPTS["c"], 2, max_new_tokens=60))
    assert engine.stats().kv_bytes == small * 80 // 32
    with_growth, alone = done, serve(make_engine(), short)
    for index in range(2):
        assert_same_bits(with_growth["a", index], alone["a", index])
    engine.sleep()
    assert engine.stats().kv_bytes == 0
    engine.submit([short])
    with pytest.raises(EngineError, match="awake"):
        engine.step()
    update(engine, 1, weights("llama", 0))
    assert_same_bits(run(engine)["a", 0], alone["a", 0])


@pytest.mark.parametrize("pack_weights", [False, True])
def test_a_sleeping_engine_has_no_weights_and_an_update_brings_them_back(pack_weights):
    engine = make_engine(pack_weights=pack_weights)
    before = serve(engine, request("a", PROMPTS["a"], 2))
    engine.sleep()
    model = engine._model
    assert not any(parameter.numel() for parameter in model.parameters())
    assert not any(layer.product.packed for layer in model.modules() if isinstance(layer, PackedLinear))
    named = weights("llama", 0)
    engine.begin_update(1, "drain")
    engine.load(named[:-1])
    with pytest.raises(WeightError, match="missing"):
        engine.end_update()
    engine.submit([request("a", PROMPTS["a"], 2)])
    with pytest.raises(EngineError, match="awake"):
        engine.step()
    update(engine, 1, named)
    after = run(engine)
    for key, completion in before.items():
        assert_same_bits(after[key], completion)


def test_abort_frees_rows_and_leaves_the_others_alone():
    engine = make_engine(max_rows=4)
    engine.submit([request("a", PROMPTS["a"], 2), request("b", PROMPTS["b"], 4), request("c", PROMPTS["c"])])
    engine.step()
    engine.abort(["a", "c", "nobody"])
    done = run(engine)
    assert sorted(done) == [("b", index) for index in range(4)]
    alone = serve(make_engine(), request("b", PROMPTS["b"], 4))
    for key in done:
        assert_same_bits(done[key], alone[key])
    engine.submit([request("a", [1])])  # its id is free again


def test_diverged_weights_are_an_error_that_names_the_request():
    engine = make_engine()
    named = weights("llama", 0)
    update(engine, 3, [(key, torch.full_like(value, torch.nan)) for key, value in named])
    engine.submit([request("a", PROMPTS["a"])])
    with pytest.raises(EngineError, match=r"finite, got nan \(request 'a', token 0, version 3\)"):
        engine.step()
    engine.abort(["a"])
    update(engine, 4, named)
    fresh = serve(make_engine(), request("a", PROMPTS["a"]))
    assert_same_bits(serve(engine, request("a", PROMPTS["a"]))["a", 0], fresh["a", 0])
