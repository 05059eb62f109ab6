"""What Concord and TRL are both given: prompts, forced lengths, settings, a scripted reward.

Read in TRL's process too, so it imports nothing of Concord.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Algorithm = Literal["ppo", "grpo"]

THREADS = 2
"""torch threads of whatever works; one side works at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of the update, equal on both sides; one epoch, one minibatch, one optimizer update an iteration."""

    learning_rate: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    kl_coef: float = 0.05
    temperature: float = 1.0
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_coef: float = 0.1
    gamma: float = 1.0
    gae_lambda: float = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One iteration's prompts and lengths; every iteration has the same."""

    name: str
    prompts: tuple[str, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    """Token ids of each prompt, all equally many."""
    lengths: tuple[tuple[int, ...], ...]
    """For each prompt the exact length of each of its responses."""
    max_new_tokens: int

    @property
    def num_samples(self) -> int:
        """Return how many responses each prompt has."""
        return len(self.lengths[0])

    @property
    def is_uniform(self) -> bool:
        """Whether all responses run to the limit, so that nothing need end them."""
        return all(length == self.max_new_tokens for row in self.lengths for length in row)

    @property
    def eos_rule(self) -> str:
        """Return how responses end, in words."""
        if self.is_uniform:
            return f"EOS does not end a response, each has exactly {self.max_new_tokens} tokens"
        return "forced lengths: Concord stops there, TRL draws EOS there and never before, then pads"

    def plain(self) -> dict[str, Any]:
        """Return it as data for JSON."""
        return {**asdict(self), "is_uniform": self.is_uniform}


_SHAPES = {"uniform": (8, 4, 44, 64), "realistic": (4, 8, 200, 128)}
"""Prompts, samples for each, prompt tokens, longest response."""

MEAN_LENGTH, SIGMA = 50.0, 0.9
"""Of the realistic workload's lognormal lengths."""

_WORDS = (
    "the film about two people who find an old house by sea and learn that time does not wait for them it is quiet "
    "warm slow but never dull with light music good actors long roads small towns bright days dark nights"
)
"""What prompts are made of."""


def make_workload(name: str, encode: Callable[[str], Sequence[int]]) -> Workload:
    """Return a workload by name.

    Args:
        name: uniform or realistic.
        encode: text to token ids, as both sides do it.
    """
    num_prompts, num_samples, num_tokens, longest = _SHAPES[name]
    draw = random.Random(0)
    prompts = [_prompt(draw, num_tokens, encode) for _ in range(num_prompts)]
    count = num_prompts * num_samples
    flat = [longest] * count if name == "uniform" else lognormal_lengths(count, MEAN_LENGTH, SIGMA, longest)
    return Workload(
        name=name,
        prompts=tuple(text for text, _ in prompts),
        prompt_ids=tuple(tuple(ids) for _, ids in prompts),
        lengths=tuple(tuple(flat[start : start + num_samples]) for start in range(0, count, num_samples)),
        max_new_tokens=longest,
    )


def lognormal_lengths(count: int, mean: float, sigma: float, longest: int, *, seed: int = 0) -> list[int]:
    """Return lognormal lengths, at most `longest`, whose mean is as near to `mean` as whole tokens allow."""
    draw = random.Random(seed)
    shapes = [draw.lognormvariate(0.0, sigma) for _ in range(count)]
    low, high = 1.0, 10.0 * mean
    lengths: list[int] = []
    for _ in range(60):  # the cap bends the mean, so the scale is found by bisection
        scale = (low + high) / 2
        lengths = [min(max(round(scale * shape), 1), longest) for shape in shapes]
        low, high = (scale, high) if sum(lengths) < mean * count else (low, scale)
    return lengths


def _prompt(draw: random.Random, num_tokens: int, encode: Callable[[str], Sequence[int]]) -> tuple[str, Sequence[int]]:
    """Return a text of exactly so many tokens, with them: words are drawn as long as they fit."""
    words = _WORDS.split()
    text = draw.choice(words)
    for _ in range(100 * num_tokens):
        ids = encode(text)
        if len(ids) == num_tokens:
            return text, ids
        longer = f"{text} {draw.choice(words)}"
        if len(encode(longer)) <= num_tokens:
            text = longer
    raise ValueError(f"prompts must have {num_tokens} tokens, and no text was found that has; use another tokenizer")


def scripted_reward(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float]:
    """Return the share of vowels of each completion: cheap, and never the same for a whole group."""
    return [sum(letter in "aeiou" for letter in text) / (len(text) or 1) for text in completions]
