"""Models with seeded random weights, and tokenizers made from an alphabet: for tests and toy tasks."""

import os
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from actors.cache import build_once, content_hash

if TYPE_CHECKING:
    from actors.config import ArchitectureConfig

PAD, EOS = "<pad>", "<eos>"


def character_tokenizer(characters: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer with one token per character, ids in the given order, then `<pad>` and `<eos>`.

    A character outside the alphabet is an error, never a silent unknown token; decoding joins without spaces.
    """
    if len(set(characters)) != len(characters):
        repeated = sorted({character for character in characters if characters.count(character) > 1})
        raise ValueError(f"tokenizer.characters must be distinct, got {repeated} twice; remove the repeats")
    tokens = [*characters, PAD, EOS]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def random_model(config: "ArchitectureConfig", *, seed: int, cache_dir: str) -> str:
    """Write a model with random weights and its tokenizer into `cache_dir`, once; return the directory.

    `vocab_size` and the special token ids are taken from the tokenizer where the architecture does not set them.

    Raises:
        ValueError: if the vocabulary sizes differ or the architecture is not one that transformers knows.
    """
    tokenizer = _tokenizer(config)
    settings = _settings(config, tokenizer)
    # The initial weights follow from the libraries' initialisers too, so their versions belong to the identity.
    key = content_hash(settings, _identity(tokenizer), seed, torch.__version__, transformers.__version__)

    def build(directory: str) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    return build_once(os.path.join(cache_dir, f"model-{key}"), build)


def _tokenizer(config: "ArchitectureConfig") -> PreTrainedTokenizerBase:
    if not isinstance(config.tokenizer, str):
        return character_tokenizer(config.tokenizer.characters)
    if not os.path.isdir(config.tokenizer):
        raise ValueError(f"policy.model.tokenizer must be a directory, got {config.tokenizer!r}; check the path")
    return AutoTokenizer.from_pretrained(config.tokenizer, local_files_only=True)


def _settings(config: "ArchitectureConfig", tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    model_type = config.architecture.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"policy.model.architecture.model_type must be a type that transformers knows, got {model_type!r}; "
            "for example llama, qwen2 or gpt2"
        )
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings = {**ids, **config.architecture}
    if settings["vocab_size"] != len(tokenizer):
        raise ValueError(
            f"policy.model.architecture.vocab_size must be the tokenizer's size {len(tokenizer)}, "
            f"got {settings['vocab_size']}; leave it out to take the tokenizer's"
        )
    return settings


def _identity(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return [tokenizer.backend_tokenizer.to_str(), special, tokenizer.chat_template]
