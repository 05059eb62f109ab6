"""Floating-point operations that a reinforcement-learning step needs, and how many a second this machine can do.

Counted from a decoder's shapes and token counts: a product with a weight matrix costs 2 operations for each weight and
position, attention 4 for each of its channels and pair of positions that see each other, a backward pass twice its
forward pass.  Norms, activations, softmax, sampling and the optimizer are not counted.

What is *needed* is what the algorithm cannot do without: a prompt once for all its samples, no padding, logits only
where a token is drawn or scored, no forward pass whose numbers are known already.  Whatever a trainer does beyond it
shows as a smaller share of the peak.

A worked example: a prompt of 3 tokens with responses of 2 and 1.  Sampling runs the prompt (6 pairs: 1 + 2 + 3), draws
both first tokens from its last logits, and feeds one drawn token, which sees 4 positions: 4 tokens, 10 pairs, 2 logits.
"""

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Critic = Literal["none", "trunk", "separate"]
"""The value function: none, a head on the policy, or a decoder of its own."""

PHASES = ("generate", "score", "train")
"""Phases that need products; what is left of a step is `other`."""

_GATED = frozenset({"gemma", "gemma2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"})
"""Architectures with three matrices in the MLP and grouped-query attention, which is what is counted."""

_FORWARD, _FORWARD_AND_BACKWARD = 1, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The shapes of a decoder."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    @property
    def layer_weights(self) -> int:
        """Return the matrix weights of one layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.hidden * (2 * queries + 2 * keys) + 3 * self.hidden * self.intermediate

    def forward_flops(self, count: "Count") -> float:
        """Return the operations of a forward pass."""
        trunk = 2 * self.layers * self.layer_weights * count.tokens
        attention = 4 * self.layers * self.heads * self.head_dim * count.pairs
        return float(trunk + attention + 2 * self.hidden * self.vocab * count.logits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """What a forward pass computes."""

    tokens: int = 0
    """Positions that go through the layers."""
    pairs: int = 0
    """Pairs of positions of which one sees the other, itself included."""
    logits: int = 0
    """Positions that go through the output head."""

    def __add__(self, other: "Count") -> "Count":
        return Count(
            tokens=self.tokens + other.tokens, pairs=self.pairs + other.pairs, logits=self.logits + other.logits
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One prompt with its samples."""

    prompt: int
    """Tokens."""
    lengths: tuple[int, ...]
    """Tokens of each response."""

    def log_probs(self) -> Count:
        """Return what sampling takes, or scoring each token: the last token of a response is never fed.

        The first tokens of all responses have one set of logits, those of the prompt's last position.
        """
        fed = [length - 1 for length in self.lengths]
        return self._row(fed, logits=1 + sum(fed))

    def states(self, *, logits: bool = False) -> Count:
        """Return what a number for each state takes, the one after the last token included."""
        return self._row(self.lengths, logits=1 + sum(length - 1 for length in self.lengths) if logits else 0)

    def _row(self, fed: Sequence[int], *, logits: int) -> Count:
        pairs = _pairs(0, self.prompt) + sum(_pairs(self.prompt, count) for count in fed)
        return Count(tokens=self.prompt + sum(fed), pairs=pairs, logits=logits)


def _pairs(before: int, count: int) -> int:
    """Return the positions that `count` tokens see which follow `before` others: 3 after 2 see 3 + 4 + 5."""
    return count * before + count * (count + 1) // 2


def needed_flops(
    architecture: Architecture, groups: Iterable[Group], *, critic: Critic, has_judge: bool
) -> dict[str, float]:
    """Return the operations that one on-policy update needs, by phase.

    Generation gives the old log-probs.  The reference scores each token.  The update runs the policy forward and
    backward; its forward pass gives the values that the advantages are made of, so there is no pass for them.

    Args:
        architecture: of policy, reference, judge and critic alike.
        groups: the step's batch.
        critic: the value function.
        has_judge: whether a reward model as large as the policy reads every response.
    """
    members = list(groups)
    sampling = sum((group.log_probs() for group in members), Count())
    states = sum((group.states() for group in members), Count())
    values = sum((group.states(logits=True) for group in members), Count())
    score = architecture.forward_flops(sampling)
    if has_judge:
        score += architecture.forward_flops(states)
    train = _FORWARD_AND_BACKWARD * architecture.forward_flops(values if critic == "trunk" else sampling)
    if critic == "separate":
        train += _FORWARD_AND_BACKWARD * architecture.forward_flops(states)
    return {"generate": _FORWARD * architecture.forward_flops(sampling), "score": score, "train": train}


def read_architecture(directory: str) -> Architecture:
    """Return the shapes of a Hugging Face model directory.

    Raises:
        ValueError: when it is an architecture that is not counted here.
    """
    with open(os.path.join(directory, "config.json"), encoding="utf-8") as file:
        config: dict[str, Any] = json.load(file)
    if config["model_type"] not in _GATED:
        raise ValueError(
            f"model_type must be one of {', '.join(sorted(_GATED))}, got {config['model_type']!r} ({directory}); "
            "operations of other decoders are not counted"
        )
    heads = config["num_attention_heads"]
    return Architecture(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
    )


def gemm_peak(*, threads: int, size: int = 2048, repeats: int = 15) -> float:
    """Return float32 operations a second of the fastest of some square matrix products."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left, right = torch.randn(size, size), torch.randn(size, size)
        fastest = min(_seconds(torch.mm, left, right) for _ in range(repeats))
    finally:
        torch.set_num_threads(before)
    return 2.0 * size**3 / fastest


def _seconds(function: Any, *arguments: Any) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started
