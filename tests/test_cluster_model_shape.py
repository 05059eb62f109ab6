"""Sizes by arithmetic against transformers' own models, which are built without memory for their weights."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from actors.config import ArchitectureConfig, CharacterTokenizerConfig
from cluster import model_config
from cluster.model_config import UnknownSizeError, read_shape, shape_of, stored_parameters
from tests.checks import Case, Check, with_twins
from tests.learner_toys import toy_directory

SIZES = {
    "hidden_size": 96, "intermediate_size": 208, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 515, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 64, "vocab_size": 515}
NO_HEAD_DIM = {name: value for name, value in SIZES.items() if name != "head_dim"}
NEOX = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
CONFIGS = {
    "llama": {"model_type": "llama", **SIZES},
    "llama-biases-tied": {
        "model_type": "llama", **SIZES, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
    },
    "llama-all-heads": {"model_type": "llama", **SIZES, "num_key_value_heads": None, "head_dim": None},
    "mistral": {"model_type": "mistral", **SIZES},
    "qwen2": {"model_type": "qwen2", **NO_HEAD_DIM},
    "qwen2-tied": {"model_type": "qwen2", **NO_HEAD_DIM, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SIZES},
    "gemma": {"model_type": "gemma", **SIZES},
    "gemma2": {"model_type": "gemma2", **SIZES},
    "gemma3": {"model_type": "gemma3_text", **SIZES},
    "phi3": {"model_type": "phi3", **NO_HEAD_DIM, "pad_token_id": 0},
    "olmo2": {"model_type": "olmo2", **NO_HEAD_DIM},
    "granite": {"model_type": "granite", **NO_HEAD_DIM},
    "smollm3": {"model_type": "smollm3", **SIZES, "pad_token_id": 0},
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gpt2-inner-untied": {"model_type": "gpt2", **GPT2, "n_inner": 100, "tie_word_embeddings": False},
    "gpt_neox": {"model_type": "gpt_neox", **NEOX},
}  # fmt: skip


def meta_model(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_model(name):
    model = meta_model(CONFIGS[name])
    shape = shape_of(CONFIGS[name], where=name)
    assert shape.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    trunk = sum(parameter.numel() for parameter in model.base_model.parameters())
    assert shape.trunk_parameters == trunk
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    assert shape.largest_module == largest


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_that_a_model_saves_says_the_same(name, tmp_path):
    AutoConfig.for_model(**CONFIGS[name]).save_pretrained(tmp_path)
    assert read_shape(str(tmp_path)) == shape_of(CONFIGS[name], where=name)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (
            {
                "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                "num_attention_heads": 32, "vocab_size": 32000,
            },
            6_738_415_616,
        ),
        (
            {
                "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
            },
            68_976_648_192,
        ),
        ({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}, 124_439_808),
        (
            {
                "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
                "tie_word_embeddings": True,
            },
            494_032_768,
        ),
    ],
    ids=["llama-2-7b", "llama-2-70b", "gpt2", "qwen2-0.5b"],
)  # fmt: skip
def test_published_sizes(config, parameters):
    assert shape_of(config, where="test").num_parameters == parameters


def test_safetensors_say_it_without_a_formula(tmp_path):
    directory = toy_directory(tmp_path / "toy")
    assert stored_parameters(directory) == read_shape(directory).num_parameters
    assert stored_parameters(str(tmp_path)) is None
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(UnknownSizeError, match=r"broken\.safetensors must be a safetensors file"):
        stored_parameters(str(tmp_path))


def test_an_architecture_takes_its_vocabulary_from_the_tokenizer():
    tokenizer = CharacterTokenizerConfig(characters="abcd")
    architecture = {name: value for name, value in CONFIGS["gpt2"].items() if name != "vocab_size"}
    assert read_shape(ArchitectureConfig(architecture=architecture, tokenizer=tokenizer)).vocab == 6


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "mamba"}, "model_type must be one of .*, got 'mamba'"),
        ({"model_type": "llama"}, "hidden_size must be set for the model's size to be planned"),
    ],
)
def test_what_is_not_counted_is_named(config, expected):
    with pytest.raises(UnknownSizeError, match=expected):
        shape_of(config, where="config.json")


def test_a_model_that_is_not_here_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnknownSizeError, match="owner/model is not on this machine"):
        read_shape("owner/model")
    snapshot = tmp_path / "models--owner--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    assert read_shape("owner/model").layers == 3


def counts_every_model(shape):
    for config in CONFIGS.values():
        model = meta_model(config)
        assert shape(config, where="test").num_parameters == sum(p.numel() for p in model.parameters())


def _with_families(**changes):
    def shape(config, *, where):
        families = {**model_config._GATED, **{name: model_config._Family(**fields) for name, fields in changes.items()}}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model_config, "_GATED", families)
            return shape_of(config, where=where)

    return shape


def _all_heads_are_keys(config, *, where):
    return shape_of({**config, "num_key_value_heads": None}, where=where)


CHECKS = (
    Check(
        id="parameters",
        run=counts_every_model,
        part=shape_of,
        twins={
            "qwen2-without-biases": _with_families(qwen2={}),
            "gemma-untied": _with_families(gemma={"head_dim": 256, "kv_heads": 16}),
            "gemma2-with-two-norms": _with_families(gemma2={"is_tied": True}),
            "no-grouped-queries": _all_heads_are_keys,
        },
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()
