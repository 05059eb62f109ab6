"""Tiny random models of several architectures, and an engine over each, for the torch engine's contract tests."""

import copy
import functools

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
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from actors.engine import Completion, Request, SamplingParams
from actors.torch_engine import TorchEngine

VOCAB, EOS = 40, 39
COMMON = {
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
    "llama": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**COMMON),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=100, bos_token_id=38, eos_token_id=EOS
    ),
    "glm": GlmConfig(**COMMON, head_dim=16),
    "mistral-window": MistralConfig(**COMMON, sliding_window=6),
    "gemma2-window-softcap": Gemma2Config(
        **COMMON, head_dim=16, sliding_window=6, attn_logit_softcapping=2.0, final_logit_softcapping=5.0
    ),
    "gemma3-window": Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=6, layer_types=None),
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


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    letters = {chr(ord("a") + index): index for index in range(26)}
    others = {f"<{index}>": index for index in range(26, VOCAB)}
    inner = Tokenizer(models.WordLevel(letters | others, unk_token="<36>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=f"<{EOS}>", pad_token="<37>", bos_token="<38>")


def make_engine(name: str = "llama", *, seed: int = 0, max_rows: int = 8, eos=(), **settings) -> TorchEngine:
    return TorchEngine(build(name, seed), tokenizer(), max_rows=max_rows, eos_ids=frozenset(eos), **settings)


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


def weights(name: str, seed: int) -> list[tuple[str, torch.Tensor]]:
    return [(key, value.detach().clone()) for key, value in build(name, seed).named_parameters()]


def update(engine: TorchEngine, version: int, named, mode="drain") -> None:
    engine.begin_update(version, mode)
    for pair in named:
        engine.load([pair])
    engine.end_update()
