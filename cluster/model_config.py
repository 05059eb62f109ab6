"""What the size of a model is, read from its directory or configuration without torch; arithmetic is `model_shape`'s.

Where a directory holds safetensors, their headers give the number of parameters exactly, of any architecture.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from actors.config import ArchitectureConfig, CharacterTokenizerConfig
from cluster.model_shape import Linear, ModelShape


class UnknownSizeError(ValueError):
    """A model's size does not follow from what is there; the message says what is missing."""


def stored_parameters(directory: str) -> int | None:
    """Return the number of parameters in a directory's safetensors, from their headers; None where there are none.

    Raises:
        UnknownSizeError: when a file is no safetensors.
    """
    names = sorted(name for name in os.listdir(directory) if name.endswith(".safetensors"))
    return sum(_stored_in(os.path.join(directory, name)) for name in names) if names else None


def read_shape(model: str | ArchitectureConfig) -> ModelShape:
    """Return the shape of a model directory, of a hub model that was downloaded, or of an architecture.

    Raises:
        UnknownSizeError: when there is no configuration, or it is of an architecture that is not counted here.
    """
    if isinstance(model, str):
        return shape_of(read_config(model), where=model)
    settings = dict(model.architecture)
    if "vocab_size" not in settings:
        settings["vocab_size"] = _vocabulary(model.tokenizer)
    return shape_of(settings, where="policy.model.architecture")


def read_config(model: str) -> dict[str, Any]:
    """Return config.json of a directory or of a hub model in the cache.

    Raises:
        UnknownSizeError: when there is none.
    """
    directory = find_directory(model)
    if directory is None:
        raise UnknownSizeError(
            f"{model} is not on this machine, so its size is not known; download it, or name a directory with its "
            "config.json"
        )
    path = os.path.join(directory, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            content: dict[str, Any] = json.load(file)
    except (OSError, ValueError) as error:
        raise UnknownSizeError(f"{path} must be a model's configuration: {error}") from error
    return content


def find_directory(model: str) -> str | None:
    """Return a model's directory, where it is one or was downloaded from the hub."""
    if os.path.isdir(model):
        return model
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(
        os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"), "hub"
    )
    snapshots = os.path.join(cache, "models--" + model.replace("/", "--"), "snapshots")
    found = sorted(os.listdir(snapshots)) if os.path.isdir(snapshots) else []
    return os.path.join(snapshots, found[-1]) if found else None


def shape_of(config: Mapping[str, Any], *, where: str) -> ModelShape:
    """Return the shape that a Hugging Face configuration describes.

    Raises:
        UnknownSizeError: when it is of an architecture that is not counted here, or lacks a number.
    """
    nested = config.get("text_config")
    settings = _Settings(nested if isinstance(nested, Mapping) else config, where)
    model_type = settings.text("model_type")
    if model_type == "gpt2":
        return _gpt2(settings)
    if model_type == "gpt_neox":
        return _gpt_neox(settings)
    if model_type in _GATED:
        return _gated(settings, model_type)
    raise UnknownSizeError(
        f"{where}: model_type must be one of {', '.join(sorted((*_GATED, 'gpt2', 'gpt_neox')))} for its size to be "
        f"planned, got {model_type!r}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What differs among decoders with a gated MLP; biases and heads where the configuration does not name them."""

    query_bias: bool | None = None
    """Of queries, keys and values; None = as `attention_bias` says."""
    output_bias: bool | None = None
    norms: int = 2
    """Of the width, in a layer."""
    head_norms: str = "none"
    """none, head (of a head's width) or all (of all heads')."""
    is_tied: bool = False
    is_fused: bool = False
    """Queries, keys and values are one layer, gate and up another."""
    head_dim: int | None = None
    kv_heads: int | None = None


_GATED: Mapping[str, _Family] = {
    "llama": _Family(),
    "granite": _Family(),
    "smollm3": _Family(is_tied=True, kv_heads=4),
    "mistral": _Family(query_bias=False, output_bias=False, kv_heads=8),
    "phi3": _Family(query_bias=False, output_bias=False, is_fused=True),
    "qwen2": _Family(query_bias=True, output_bias=False, kv_heads=32),
    "qwen3": _Family(head_norms="head", head_dim=128, kv_heads=32),
    "olmo2": _Family(head_norms="all"),
    "gemma": _Family(is_tied=True, head_dim=256, kv_heads=16),
    "gemma2": _Family(is_tied=True, norms=4, head_dim=256, kv_heads=4),
    "gemma3_text": _Family(is_tied=True, norms=4, head_norms="head", head_dim=256, kv_heads=4),
}


class _Settings:
    """A configuration whose numbers must be there."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    def number(self, *names: str, default: int | None = None) -> int:
        """Return the first of these that is set."""
        for name in names:
            if self._values.get(name) is not None:
                return int(self._values[name])
        if default is None:
            raise UnknownSizeError(f"{self._where}: {names[0]} must be set for the model's size to be planned")
        return default

    def text(self, name: str) -> str:
        """Return a text, empty where it is not set."""
        return str(self._values.get(name) or "")

    def flag(self, name: str, *, default: bool) -> bool:
        """Return a switch."""
        value = self._values.get(name)
        return default if value is None else bool(value)

    def limit(self, *names: str) -> int | None:
        """Return a number that need not be there."""
        return next((int(self._values[name]) for name in names if self._values.get(name) is not None), None)


def _gated(settings: _Settings, model_type: str) -> ModelShape:
    family = _GATED[model_type]
    hidden, heads = settings.number("hidden_size"), settings.number("num_attention_heads")
    head_dim = settings.number("head_dim", default=family.head_dim or hidden // heads)
    kv_heads = settings.number("num_key_value_heads", default=family.kv_heads or heads)
    intermediate = settings.number("intermediate_size")
    attention_bias, mlp_bias = settings.flag("attention_bias", default=False), settings.flag("mlp_bias", default=False)
    query_bias = attention_bias if family.query_bias is None else family.query_bias
    output_bias = attention_bias if family.output_bias is None else family.output_bias
    queries, keys = heads * head_dim, kv_heads * head_dim
    projections = [queries + 2 * keys] if family.is_fused else [queries, keys, keys]
    ups = [2 * intermediate] if family.is_fused else [intermediate, intermediate]
    linears = (
        *(Linear(inputs=hidden, outputs=outputs, has_bias=query_bias) for outputs in projections),
        Linear(inputs=queries, outputs=hidden, has_bias=output_bias),
        *(Linear(inputs=hidden, outputs=outputs, has_bias=mlp_bias) for outputs in ups),
        Linear(inputs=intermediate, outputs=hidden, has_bias=mlp_bias),
    )
    head_norms = {"none": 0, "head": 2 * head_dim, "all": queries + keys}[family.head_norms]
    return ModelShape(
        model_type=model_type,
        hidden=hidden,
        layers=settings.number("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        vocab=settings.number("vocab_size"),
        positions=settings.limit("max_position_embeddings"),
        linears=linears,
        norm_parameters=family.norms * hidden + head_norms,
        other_parameters=hidden,
        is_tied=settings.flag("tie_word_embeddings", default=family.is_tied),
        is_gated=True,
    )


def _gpt2(settings: _Settings) -> ModelShape:
    hidden, positions = settings.number("n_embd", "hidden_size"), settings.number("n_positions", default=1024)
    plain = _plain(
        settings,
        hidden=hidden,
        intermediate=settings.number("n_inner", default=4 * hidden),
        names=("n_layer", "n_head"),
        has_attention_bias=True,
    )
    return replace(
        plain,
        positions=positions,
        other_parameters=plain.other_parameters + positions * hidden,
        is_tied=settings.flag("tie_word_embeddings", default=True),
    )


def _gpt_neox(settings: _Settings) -> ModelShape:
    return _plain(
        settings,
        hidden=settings.number("hidden_size"),
        intermediate=settings.number("intermediate_size"),
        names=("num_hidden_layers", "num_attention_heads"),
        has_attention_bias=settings.flag("attention_bias", default=True),
    )


def _plain(
    settings: _Settings, *, hidden: int, intermediate: int, names: tuple[str, str], has_attention_bias: bool
) -> ModelShape:
    """Return a decoder with biases, norms with a mean, no gate, and as many key-value heads as heads.

    Args:
        settings: the configuration.
        hidden: width.
        intermediate: of the MLP.
        names: of the settings of layers and heads.
        has_attention_bias: whether attention's layers have biases; the MLP's have.
    """
    heads = settings.number(names[1])
    return ModelShape(
        model_type=settings.text("model_type"),
        hidden=hidden,
        layers=settings.number(names[0]),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=intermediate,
        vocab=settings.number("vocab_size"),
        positions=settings.limit("max_position_embeddings"),
        linears=(
            Linear(inputs=hidden, outputs=3 * hidden, has_bias=has_attention_bias),
            Linear(inputs=hidden, outputs=hidden, has_bias=has_attention_bias),
            Linear(inputs=hidden, outputs=intermediate, has_bias=True),
            Linear(inputs=intermediate, outputs=hidden, has_bias=True),
        ),
        norm_parameters=4 * hidden,
        other_parameters=2 * hidden,
        is_tied=settings.flag("tie_word_embeddings", default=False),
        is_gated=False,
    )


def _vocabulary(tokenizer: str | CharacterTokenizerConfig) -> int:
    """Return a tokenizer's number of tokens."""
    if not isinstance(tokenizer, str):
        return len(tokenizer.characters) + 2  # <pad> and <eos>
    path = os.path.join(tokenizer, "tokenizer.json")
    try:
        with open(path, encoding="utf-8") as file:
            content: dict[str, Any] = json.load(file)
        tokens = {entry["content"] for entry in content["added_tokens"]}
        vocabulary = content["model"]["vocab"]
        names = vocabulary if isinstance(vocabulary, Mapping) else [entry[0] for entry in vocabulary]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnknownSizeError(f"{path} must be a tokenizer, or policy.model.architecture.vocab_size set") from error
    return len(tokens.union(names))


def _stored_in(path: str) -> int:
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise UnknownSizeError(f"{path} must be a safetensors file: {error}") from error
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            size = 1
            for extent in entry["shape"]:
                size *= extent
            total += size
    return total
