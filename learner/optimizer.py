"""The optimizer seam: what training code asks of whatever owns parameters, gradients and their sharding.

Two implementations: `learner/zero.py` (DeepSpeed ZeRO) and `learner/local.py` (plain torch, one process).  Training code above the
seam never asks which one it has.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from learner.config import OptimizerConfig


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite on some rank; the update was skipped on all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Parameters by name whose learning rate is `scale` times the schedule's."""

    names: frozenset[str]
    scale: float


def learning_rate_at(update: int, total: int, config: OptimizerConfig) -> float:
    """Return the learning rate of update `update` (from 0) of `total`.

    Warm-up runs at (update + 1) / warmup_steps of the peak, and decay reaches 0 only after the last update, so no update
    has rate 0.
    """
    if update < config.warmup_steps:
        return config.learning_rate * (update + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (update - config.warmup_steps) / max(1, total - config.warmup_steps)
    factor = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * max(factor, 0.0)


class OptimizerEngine(Protocol):
    """Owns a module, its optimizer and the group of its ranks.  Every method is called by all ranks together."""

    module: nn.Module
    rank: int
    world_size: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, with whatever hooks its sharding needs."""

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of `loss`.

        `loss` is this rank's share of the global loss: already divided by the global denominator, so that the sum over
        ranks and micro-batches is the loss of the whole minibatch.
        """

    def step(self, learning_rate: float) -> float:
        """Clip the global gradient norm, update, zero the gradients; return the norm before clipping.

        Raises:
            NonFiniteError: on all ranks, with gradients dropped and parameters unchanged.
        """

    def all_reduce(self, values: torch.Tensor, operation: str = "sum") -> torch.Tensor:
        """Return `values` reduced over ranks; operation is sum or max."""

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's (small, picklable) value, in rank order."""

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Inside it, `parameters` hold their full values on every rank, read-only."""

    def full_state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yield, in one order on all ranks, parameter name -> full float32 `param`, `exp_avg`, `exp_avg_sq`."""

    def load_full_state(self, state: Any) -> None:
        """Set parameters and optimizer state from a mapping shaped like `full_state`, plus the number of updates."""

    @property
    def num_updates(self) -> int:
        """Optimizer updates so far: Adam's step count."""

    def close(self) -> None:
        """Free memory and leave the process group."""
