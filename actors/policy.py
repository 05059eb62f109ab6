"""Loading the policy: model directory, weights, tokenizer, stop ids.

One place for every room, so that engine, reference and learner run the same network with the same attention and no
dropout. Encoding prompts is in `encoding.py`, models with random weights in `architecture.py`, log-probs in
`scoring.py`.
"""

import os
import re
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from actors.architecture import random_model
from actors.encoding import PromptEncoder

if TYPE_CHECKING:
    from actors.config import PolicyConfig

__all__ = [
    "PromptEncoder",
    "attention_implementation",
    "eos_ids",
    "load_model",
    "load_tokenizer",
    "local_directory",
    "materialize",
    "max_positions",
    "resolve_dtype",
    "without_dropout",
]

_HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.py"]


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype called `name`; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in known:
        raise ValueError(f"dtype must be one of auto, {', '.join(known)}, got {name!r}")
    return known[name]


def materialize(config: "PolicyConfig", *, seed: int, cache_dir: str) -> str:
    """Return a local directory with the policy's configuration, tokenizer and safetensors weights.

    Args:
        config: `model` is a directory, a hub name, or an architecture to fill with random weights.
        seed: Of random weights.
        cache_dir: Where random models are kept, by content.

    Raises:
        ValueError: if there is no such model, or its tokenizer has more tokens than the model has embeddings.
    """
    if not isinstance(config.model, str):
        return random_model(config.model, seed=seed, cache_dir=cache_dir)
    directory = local_directory(config.model, what="policy.model")
    trust = config.trust_remote_code
    settings = AutoConfig.from_pretrained(directory, trust_remote_code=trust, local_files_only=True)
    num_embeddings = settings.get_text_config().vocab_size
    num_tokens = len(load_tokenizer(directory, trust_remote_code=trust))
    if num_tokens > num_embeddings:
        raise ValueError(
            f"policy.model must have an embedding for each token, got vocab_size {num_embeddings} and a tokenizer with "
            f"{num_tokens} tokens ({directory}); use the tokenizer that belongs to the model"
        )
    return directory


def max_positions(directory: str, *, trust_remote_code: bool = False) -> int | None:
    """Return how many tokens, prompt and response together, the model in `directory` has positions for.

    None if its configuration sets no limit.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def local_directory(model: str, *, what: str) -> str:
    """Return the absolute path of a model directory, downloading a hub name's safetensors if need be.

    Raises:
        ValueError: naming the setting `what`, if there is neither a directory nor a hub model of that name.
    """
    if os.path.isdir(model):
        if not os.path.isfile(os.path.join(model, "config.json")):
            raise ValueError(f"{what} must be a model directory with a config.json, got {os.path.abspath(model)!r}")
        return os.path.abspath(model)
    if not _HUB_NAME.match(model):
        raise ValueError(f"{what} must be an existing directory or a hub name, got {model!r}; check the path")
    try:
        return snapshot_download(model, allow_patterns=_HUB_FILES)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{what} must be an existing directory or a hub name, got {model!r}: no directory "
            f"{os.path.abspath(model)!r}, and the hub does not provide it ({type(error).__name__})"
        ) from error


def load_model(
    directory: str, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Return the decoder language model in `directory`, in eval mode, without dropout."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        config=without_dropout(config),
        dtype=dtype,
        attn_implementation=attention_implementation(config),
        use_safetensors=True,  # never unpickle a file that comes from someone else
        trust_remote_code=trust_remote_code,
        local_files_only=True,
    )
    torch.nn.Module.to(model, device)
    return model.eval()


def load_tokenizer(directory: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer in `directory`."""
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)


def attention_implementation(config: PreTrainedConfig) -> str:
    """Return `sdpa`, or `eager` for models that cap their attention scores, which sdpa would silently not do."""
    capped = config.get_text_config().to_dict().get("attn_logit_softcapping")
    return "sdpa" if capped is None else "eager"


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Set every dropout rate of `config` to 0, in place, and return it.

    In the configuration rather than by `eval()` alone: some models read the rate from there, and a group's samples
    that share their prompt's row must not share its noise.
    """
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def load_generation_config(model_dir: str) -> GenerationConfig:
    """Return a model directory's generation configuration, an empty one where there is none."""
    try:
        return GenerationConfig.from_pretrained(model_dir)
    except OSError:
        return GenerationConfig()


def eos_ids(model_or_generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the token ids that end a response: the generation configuration's and the tokenizer's.

    Raises:
        ValueError: if there is none, as then no response could end by itself.
    """
    generation = getattr(model_or_generation_config, "generation_config", model_or_generation_config)
    given = generation.eos_token_id
    ids = {given} if isinstance(given, int) else set(given or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if not ids:
        raise ValueError(
            "the tokenizer must have an end-of-sequence token, got none; set eos_token in its configuration"
        )
    return frozenset(ids)
