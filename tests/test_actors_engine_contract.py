"""What every engine promises, asked of each one that is installed: the torch engine, and vLLM where it is.

VENV=... with the extra `vllm`; python -m pytest tests/test_actors_engine_contract.py
"""

import copy
import importlib.util
import os

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from actors.engine import EngineError
from actors.torch_engine import TorchEngine
from actors.weights import WeightError
from tests.engine_toys import COMMON, EOS, PROMPTS, plain_logprobs, request, run, serve, tokenizer, update

CONFIG = LlamaConfig(**{**COMMON, "hidden_size": 64, "num_attention_heads": 2}, head_dim=32, tie_word_embeddings=True)
HAS_VLLM = importlib.util.find_spec("vllm") is not None
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def toy(seed):
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIG)  # an engine changes its model's
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    return model


def weights_of(seed):
    return [(name, value.detach().clone()) for name, value in toy(seed).named_parameters()]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("toy"))
    toy(0).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(
    scope="module",
    params=["torch", pytest.param("vllm", marks=pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed"))],
)
def make(request, model_dir):
    """Return a function that gives an idle engine at version 0; vLLM's is built once for each set of EOS tokens."""
    built = {}

    def make_torch(eos=()):
        return TorchEngine(toy(0), tokenizer(), max_rows=8, eos_ids=frozenset(eos))

    def make_vllm(eos=()):
        os.environ.update(VLLM_ENVIRONMENT)
        from actors.vllm_engine import VLLMEngine

        if eos not in built:
            built[eos] = VLLMEngine(
                model_dir, tokenizer(), dtype=torch.float32, max_rows=8, eos_ids=frozenset(eos), max_len=128
            )
        return built[eos]

    def make(eos=()):
        engine = (make_torch if request.param == "torch" else make_vllm)(eos)
        update(engine, 0, weights_of(0))
        return engine

    return make


def test_greedy_equals_generate(make):
    model = toy(0)
    done = serve(make(), *[request(key, prompt, temperature=0.0) for key, prompt in PROMPTS.items()])
    for key, prompt in PROMPTS.items():
        whole = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=37
        )
        assert done[key, 0].response_ids.tolist() == whole[0, len(prompt) :].tolist()
        assert done[key, 0].finish_reason == "length"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_are_those_of_a_plain_forward_after_the_temperature(make, temperature):
    model = toy(0)
    done = serve(make(), *[request(key, prompt, 3, temperature=temperature) for key, prompt in PROMPTS.items()])
    assert len(done) == 12
    for (key, _), completion in done.items():
        expected = plain_logprobs(model, PROMPTS[key], completion.response_ids, temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
        assert completion.response_text == tokenizer().decode(completion.response_ids, skip_special_tokens=True)


def test_samples_of_a_shared_prompt_are_as_good_as_of_separate_ones_and_differ(make):
    prompt, model = PROMPTS["c"] + PROMPTS["c"], toy(0)
    shared = serve(make(), request("x", prompt, 4, max_new_tokens=20))
    assert len({tuple(completion.response_ids) for completion in shared.values()}) == 4
    for completion in shared.values():
        expected = plain_logprobs(model, prompt, completion.response_ids)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    greedy = serve(make(), request("g", prompt, 3, temperature=0.0), request("h", prompt, temperature=0.0))
    assert len({tuple(completion.response_ids) for completion in greedy.values()}) == 1


def test_an_update_changes_what_is_sampled_and_its_version(make):
    engine = make()
    update(engine, 7, weights_of(1))
    completion = serve(engine, request("a", PROMPTS["a"]))["a", 0]
    assert set(completion.policy_versions) == {7}
    expected = plain_logprobs(toy(1), PROMPTS["a"], completion.response_ids)
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    old = plain_logprobs(toy(0), PROMPTS["a"], completion.response_ids)
    assert np.abs(old - expected).max() > 0.1, "the planted bug, weights that stayed, would be seen"


@pytest.mark.parametrize("mode", ["keep", "reprefill"])
def test_an_update_in_flight_goes_on_with_versions_per_token(make, mode):
    engine = make()
    engine.submit([request("a", PROMPTS["a"], 2), request("b", PROMPTS["c"] * 2, 11)])
    for _ in range(4):
        engine.step()
    update(engine, 1, weights_of(1), mode)
    done = run(engine)
    for key in [("a", 0), ("a", 1), ("b", 0)]:
        completion, prompt = done[key], PROMPTS["a"] if key[0] == "a" else PROMPTS["c"] * 2
        split = completion.policy_versions.tolist().count(0)
        assert 0 < split < 12
        assert completion.policy_versions.tolist() == [0] * split + [1] * (12 - split)
        by_old = plain_logprobs(toy(0), prompt, completion.response_ids)
        np.testing.assert_allclose(completion.logprobs[:split], by_old[:split], atol=1e-4)
        if mode == "reprefill":
            by_new = plain_logprobs(toy(1), prompt, completion.response_ids)
            np.testing.assert_allclose(completion.logprobs[split:], by_new[split:], atol=1e-4)
    late = done["b", 10]  # it waited for a row, and must not use the prompt that the old weights cached
    assert set(late.policy_versions) == {1}
    expected = plain_logprobs(toy(1), PROMPTS["c"] * 2, late.response_ids)
    np.testing.assert_allclose(late.logprobs, expected, atol=1e-4)


def test_a_drain_update_refuses_live_requests_and_every_update_is_whole(make):
    engine = make()
    engine.submit([request("a", PROMPTS["a"])])
    engine.step()
    with pytest.raises(EngineError, match="no request must be live"):
        engine.begin_update(1, "drain")
    run(engine)
    named = weights_of(1)
    engine.begin_update(1, "drain")
    engine.load(named[1:])
    with pytest.raises(EngineError, match="between updates"):
        engine.step()
    with pytest.raises(WeightError, match="missing"):
        engine.end_update()
    with pytest.raises(WeightError, match="once"):
        engine.load(named[1:2])
    update(engine, 2, named)
    assert engine.version == 2
    assert not engine.is_updating


def test_eos_is_included_exactly_once(make):
    eos = (1, 5, 9, 17, EOS)
    done = serve(make(eos), *[request(key, prompt, 8, max_new_tokens=40) for key, prompt in PROMPTS.items()])
    assert sum(completion.finish_reason == "eos" for completion in done.values()) > 20
    for completion in done.values():
        found = [token in eos for token in completion.response_ids.tolist()]
        assert sum(found) == (completion.finish_reason == "eos")
        assert not any(found[:-1])
        assert len(completion.logprobs) == len(completion.policy_versions) == len(found)


def test_a_stop_string_ends_with_the_token_that_completes_it(make):
    stop = ("ab", "zz", "c")
    done = serve(make(), request("a", PROMPTS["a"], 8, max_new_tokens=40, stop=stop))
    stopped = [completion for completion in done.values() if completion.finish_reason == "stop"]
    assert stopped
    for completion in done.values():
        text = completion.response_text
        ends = [text.index(string) + len(string) for string in stop if string in text]
        assert (completion.finish_reason == "stop") == bool(ends)
        assert not ends or min(ends) == len(text), "nothing follows"


def test_forced_lengths_are_met(make):
    done = serve(make((1, 5, 9, 17, EOS)), request("a", PROMPTS["a"], 3, forced=(2, 9, 12)))
    assert [len(done["a", index].response_ids) for index in range(3)] == [2, 9, 12]


def test_abort_frees_rows_and_leaves_the_others_alone(make):
    engine = make()
    engine.submit([request("a", PROMPTS["a"], 2), request("b", PROMPTS["b"], 4), request("c", PROMPTS["c"], 6)])
    engine.step()
    engine.abort(["a", "c", "nobody"])
    assert sorted(run(engine)) == [("b", index) for index in range(4)]
    assert serve(engine, request("a", [1])), "its id is free again"


def test_what_can_never_be_served_is_refused(make):
    engine = make()
    with pytest.raises(ValueError, match="must fit into 128 tokens"):
        engine.submit([request("a", [1]), request("long", [1] * 120)])
    assert not engine.has_work


@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
def test_processes_that_share_a_replica_say_what_one_says_and_take_new_weights(model_dir):
    os.environ.update(VLLM_ENVIRONMENT)
    from actors.vllm_engine import VLLMEngine

    engine = VLLMEngine(
        model_dir,
        tokenizer(),
        dtype=torch.float32,
        max_rows=8,
        eos_ids=frozenset(),
        max_len=128,
        tensor_parallel=2,
    )
    for seed in (0, 1):
        update(engine, seed, weights_of(seed))
        done = serve(engine, *[request(key, prompt, temperature=0.0) for key, prompt in PROMPTS.items()])
        model = toy(seed)
        for key, prompt in PROMPTS.items():
            whole = model.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=37
            )
            assert done[key, 0].response_ids.tolist() == whole[0, len(prompt) :].tolist()
            expected = plain_logprobs(model, prompt, done[key, 0].response_ids)
            np.testing.assert_allclose(done[key, 0].logprobs, expected, atol=1e-4)
