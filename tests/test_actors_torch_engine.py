"""Contract of the torch engine on tiny random models of several architectures."""

import copy
import itertools

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GlmConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from actors.engine import Completion, EngineError, Request, SamplingParams
from actors.slots import Prefix
from actors.torch_engine import TorchEngine
from actors.weights import WeightError

VOCAB, EOS = 40, 39
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 38,
    "eos_token_id": EOS,
    "pad_token_id": 37,
}
CONFIGS = {
    "llama": LlamaConfig(**_COMMON, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_COMMON),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=100, bos_token_id=38, eos_token_id=EOS
    ),
    "glm": GlmConfig(**_COMMON, head_dim=16),
    "mistral-window": MistralConfig(**_COMMON, sliding_window=6),
    "gemma2-window-softcap": Gemma2Config(
        **_COMMON, head_dim=16, sliding_window=6, attn_logit_softcapping=2.0, final_logit_softcapping=5.0
    ),
    "gemma3-window": Gemma3TextConfig(**_COMMON, head_dim=8, sliding_window=6, layer_types=None),
}
every_architecture = pytest.mark.parametrize("name", CONFIGS)


def build(name: str, seed: int = 0):
    """A random model whose attention matters: weights re-drawn with a large spread."""
    config = copy.deepcopy(CONFIGS[name])  # an engine changes its model's config
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3, generator=generator)
        else:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    letters = {chr(ord("a") + index): index for index in range(26)}
    others = {f"<{index}>": index for index in range(26, VOCAB)}
    inner = Tokenizer(models.WordLevel(letters | others, unk_token="<36>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=f"<{EOS}>", pad_token="<37>", bos_token="<38>")


@pytest.fixture
def make_engine(tokenizer):
    def make(name: str = "llama", *, seed: int = 0, max_rows: int = 8, eos=(), **settings) -> TorchEngine:
        return TorchEngine(build(name, seed), tokenizer, max_rows=max_rows, eos_ids=frozenset(eos), **settings)

    return make


def request(identity: str, prompt, samples: int = 1, *, forced=(), **sampling) -> Request:
    return Request(
        request_id=identity,
        prompt_ids=list(prompt),
        num_samples=samples,
        seed=hash_free_seed(identity),
        sampling=SamplingParams(**{"max_new_tokens": 12, **sampling}),
        forced_lengths=tuple(forced),
    )


def hash_free_seed(identity: str) -> int:
    return sum(ord(letter) * 31**index for index, letter in enumerate(identity))


def run(engine: TorchEngine) -> dict[tuple[str, int], Completion]:
    done = {}
    while engine.has_work:
        for completion in engine.step():
            key = (completion.request_id, completion.sample_index)
            assert key not in done
            done[key] = completion
    return done


def serve(engine: TorchEngine, *requests: Request) -> dict[tuple[str, int], Completion]:
    engine.submit(requests)
    return run(engine)


def assert_same_bits(first: Completion, second: Completion) -> None:
    assert first.response_ids.tolist() == second.response_ids.tolist()
    assert first.logprobs.tobytes() == second.logprobs.tobytes()
    assert first.finish_reason == second.finish_reason


@torch.no_grad()
def plain_logprobs(model, prompt, response, temperature: float = 1.0) -> np.ndarray:
    """Log-probs by one ordinary forward of an untouched model."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    picked = torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(response)[:, None].long())
    return picked[:, 0].numpy()


PROMPTS = {"a": [1, 2, 3, 4, 5], "b": [7] * 11, "c": list(range(20)), "d": [9, 30]}


@every_architecture
def test_greedy_equals_generate(name, make_engine):
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
def test_recorded_logprobs_equal_a_plain_forward(name, temperature, make_engine):
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
def test_a_hook_without_window_or_softcap_is_caught(name, make_engine, monkeypatch):
    """Planted bug: the plain rule is silently wrong on these models, and the check above sees it."""
    model, attend = build(name), Prefix.attend

    def plain(self, layer, query, key, value, rule):
        from actors.slots import AttentionRule

        bare = AttentionRule(scaling=rule.scaling, sliding_window=None, softcap=None)
        return attend(self, layer, query, key, value, bare)

    monkeypatch.setattr(Prefix, "attend", plain)
    completion = serve(make_engine(name), request("c", PROMPTS["c"]))["c", 0]
    expected = plain_logprobs(model, PROMPTS["c"], completion.response_ids)
    assert np.abs(completion.logprobs - expected).max() > 1e-2


@every_architecture
def test_same_bits_alone_and_in_any_company(name, make_engine):
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


def test_company_check_sees_a_shared_generator(make_engine):
    """Planted bug: draws that depend on the batch (here: on the row) break the equality."""
    engine = make_engine()
    count = itertools.count()
    engine._hook = lambda logits, ids: (
        logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(next(count)))
    )
    together = serve(engine, request("d", PROMPTS["d"], 4), request("a", PROMPTS["a"], 2))
    alone = serve(engine, request("a", PROMPTS["a"], 2))
    assert together["a", 0].logprobs.tobytes() != alone["a", 0].logprobs.tobytes()


@every_architecture
def test_shared_prompt_equals_separate_prompts(name, make_engine):
    prompt = PROMPTS["b"]
    shared = serve(make_engine(name), request("x", prompt, 4, max_new_tokens=20))
    engine = make_engine(name)
    for index in range(4):
        # The engine prefills for the last sample alone, after the others were dropped.
        engine.submit([request("x", prompt, index + 1, max_new_tokens=20)])
        separate = run(engine)["x", index]
        assert_same_bits(shared["x", index], separate)
    assert len({tuple(completion.response_ids) for completion in shared.values()}) == 4  # samples differ


def test_slots_are_refilled_at_once_and_kept_dense(make_engine):
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


def test_partially_admitted_group_continues_while_others_wait(make_engine):
    engine = make_engine(max_rows=4)
    done = serve(engine, request("a", PROMPTS["a"], 11), request("b", PROMPTS["b"], 2))
    reference = serve(make_engine(max_rows=16), request("b", PROMPTS["b"], 2), request("a", PROMPTS["a"], 11))
    assert len(done) == 13
    for key, completion in done.items():
        assert_same_bits(completion, reference[key])
    assert engine.stats().num_prefill_tokens == 5 + 11


def test_eos_is_included_exactly_once(make_engine):
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


def test_stop_string_ends_with_the_token_that_completes_it(make_engine):
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


def test_response_text_has_no_special_tokens(make_engine, tokenizer):
    def prefer(logits, ids):
        logits = torch.full_like(logits, -50.0)
        logits[:, [0, EOS]] = torch.tensor([0.0, 1.0])
        return logits

    engine = make_engine(eos=[EOS], logits_hook=prefer)
    completion = serve(engine, request("a", [3], 8))["a", 0]
    assert completion.response_ids[-1] == EOS
    assert completion.response_text == "a" * (len(completion.response_ids) - 1)


def test_logits_hook_sees_every_draw_and_its_result_is_recorded(make_engine):
    seen = []

    def only_even(logits, ids):
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


def weights(name: str, seed: int) -> list[tuple[str, torch.Tensor]]:
    return [(key, value.detach().clone()) for key, value in build(name, seed).named_parameters()]


def update(engine: TorchEngine, version: int, named, mode="drain") -> None:
    engine.begin_update(version, mode)
    for pair in named:
        engine.load([pair])
    engine.end_update()


@every_architecture
def test_load_in_place_equals_a_fresh_engine(name, make_engine):
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
def test_update_in_flight_records_versions_per_token(mode, make_engine):
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


def test_drain_update_refuses_live_requests(make_engine):
    engine = make_engine()
    engine.submit([request("a", PROMPTS["a"])])
    engine.begin_update(0, "drain")  # only waiting: fine
    engine.load(weights("llama", 0))
    engine.end_update()
    engine.step()
    with pytest.raises(EngineError, match="no request must be live"):
        engine.begin_update(1, "drain")


def test_an_update_must_bring_every_tensor_once(make_engine):
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


def test_requests_that_can_never_be_served_are_refused(make_engine):
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


def test_short_max_len_and_few_rows_are_refused(make_engine):
    with pytest.raises(ValueError, match="must fit into 16 tokens"):
        make_engine(max_len=16).submit([request("a", PROMPTS["a"])])
    with pytest.raises(ValueError, match="multiple of 4"):
        make_engine(max_rows=6)


def test_unknown_attention_keyword_is_refused(tokenizer):
    config = GptOssConfig(**_COMMON, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    engine = TorchEngine(model, tokenizer, max_rows=4, eos_ids=frozenset())
    engine.submit([request("a", [1, 2])])
    with pytest.raises(ValueError, match=r"'s_aux' \(GptOssAttention\)"):
        engine.step()


def test_memory_grows_for_a_longer_request_and_sleep_releases_it(make_engine):
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
    engine.wake()
    assert_same_bits(run(engine)["a", 0], alone["a", 0])


def test_abort_frees_rows_and_leaves_the_others_alone(make_engine):
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


def test_diverged_weights_are_an_error_that_names_the_request(make_engine):
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
