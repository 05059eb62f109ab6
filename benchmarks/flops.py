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

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.model_shape import ModelShape

Critic = Literal["none", "trunk", "separate"]
"""The value function: none, a head on the policy, or a decoder of its own."""

PHASES = ("generate", "score", "train")
"""Phases that need products; what is left of a step is `other`."""

_FORWARD, _FORWARD_AND_BACKWARD = 1, 3


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


def forward_flops(shape: ModelShape, count: Count) -> float:
    """Return the operations of a forward pass."""
    weights = sum(linear.inputs * linear.outputs for linear in shape.linears)
    trunk = 2 * shape.layers * weights * count.tokens
    attention = 4 * shape.layers * shape.heads * shape.head_dim * count.pairs
    return float(trunk + attention + 2 * shape.hidden * shape.vocab * count.logits)


def needed_flops(shape: ModelShape, groups: Iterable[Group], *, critic: Critic, has_judge: bool) -> dict[str, float]:
    """Return the operations that one on-policy update needs, by phase.

    Generation gives the old log-probs.  The reference scores each token.  The update runs the policy forward and
    backward; its forward pass gives the values that the advantages are made of, so there is no pass for them.

    Args:
        shape: of policy, reference, judge and critic alike.
        groups: the step's batch.
        critic: the value function.
        has_judge: whether a reward model as large as the policy reads every response.
    """
    members = list(groups)
    sampling = sum((group.log_probs() for group in members), Count())
    states = sum((group.states() for group in members), Count())
    values = sum((group.states(logits=True) for group in members), Count())
    score = forward_flops(shape, sampling)
    if has_judge:
        score += forward_flops(shape, states)
    train = _FORWARD_AND_BACKWARD * forward_flops(shape, values if critic == "trunk" else sampling)
    if critic == "separate":
        train += _FORWARD_AND_BACKWARD * forward_flops(shape, states)
    return {"generate": _FORWARD * forward_flops(shape, sampling), "score": score, "train": train}


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
