"""The optimizer seam: what training code asks of whatever owns parameters, gradients and their sharding.

Two implementations: `learner/zero.py` (DeepSpeed ZeRO) and `learner/local.py` (plain torch, one process).  Training
code above the seam never asks which one it has.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from learner.config import OptimizerConfig


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite on some rank; the update was skipped on all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """Parameters by name whose learning rate is `scale` times the schedule's."""

    names: frozenset[str]
    scale: float


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

    def discard(self) -> None:
        """Drop the accumulated gradients without an update."""

    def all_reduce(self, values: torch.Tensor, operation: str = "sum") -> torch.Tensor:
        """Return `values` reduced over ranks; operation is sum or max."""

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's (small, picklable) value, in rank order."""

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Inside it, `parameters` hold their full values on every rank, read-only."""

    def full_state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yield, in one order on all ranks, trained name -> full float32 `param`, `exp_avg`, `exp_avg_sq`."""

    def load_full_state(self, state: Mapping[str, Mapping[str, torch.Tensor]], num_updates: int) -> None:
        """Set parameters and optimizer state from a mapping shaped like `full_state`, and the number of updates."""

    @property
    def num_updates(self) -> int:
        """Optimizer updates so far: Adam's step count."""

    def offload(self) -> None:
        """Move weights and optimizer state from the device to main memory; nothing else may be asked until `reload`."""

    def reload(self) -> None:
        """Move them back; nothing happens where they are there."""

    def close(self) -> None:
        """Free memory and leave the process group."""


def adamw_groups(
    parameters: Mapping[str, nn.Parameter], groups: Sequence[ParameterGroup], config: "OptimizerConfig"
) -> list[dict[str, Any]]:
    """Return torch optimizer groups: one for each `ParameterGroup`, and one of scale 1 for all other parameters.

    Raises:
        ValueError: if a group names a parameter that is not trained, or two groups name the same.
    """
    named = [name for group in groups for name in sorted(group.names)]
    unknown = sorted(set(named) - set(parameters))
    if unknown:
        raise ValueError(f"parameter groups must name trained parameters, got {unknown}; check the names")
    if len(named) != len(set(named)):
        raise ValueError(f"parameter groups must not overlap, got {sorted(n for n in named if named.count(n) > 1)}")
    rest = ParameterGroup(names=frozenset(set(parameters) - set(named)), scale=1.0)
    return [
        {
            "params": [p for name, p in parameters.items() if name in group.names],
            "scale": group.scale,
            "lr": 0.0,
            "weight_decay": config.weight_decay,
        }
        for group in (rest, *groups)
        if group.names
    ]


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Scale gradients to a global norm of at most `max_norm`, without a pass over those that are within it.

    Returns:
        The norm before.
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    length = float(norm)
    if not length + 1e-6 <= max_norm:  # what torch adds; a norm that is no number scales too
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return length


def make_engine(
    module: nn.Module,
    config: "OptimizerConfig",
    *,
    backend: Literal["zero", "local"],
    zero_stage: int,
    rank: int = 0,
    world_size: int = 1,
    groups: Sequence[ParameterGroup] = (),
    dtype: torch.dtype = torch.float32,
    offloads: bool = False,
    device: torch.device | None = None,
) -> OptimizerEngine:
    """Return the engine that owns `module` and trains it in `dtype`.

    Args:
        module: what `forward` calls; parameters that do not require gradients stay as they are.
        config: AdamW's settings; the learning rate is given to each `step`.
        backend: zero is DeepSpeed, local plain torch in one process.
        zero_stage: what DeepSpeed shards; not used by local.
        rank: this process among `world_size`.
        world_size: processes that train together.
        groups: parameters with a learning rate of their own; the rest follow the schedule.
        dtype: of the forward pass; the optimizer works in float32.
        offloads: keep master weights and moments in main memory, and update there; DeepSpeed from stage 1 on.
        device: where DeepSpeed's stage 3 works with a module that is elsewhere; None = where the module is.
    """
    if backend == "local":
        from learner.local import LocalEngine

        if world_size != 1:
            raise ValueError(f"world_size must be 1 with backend local, got {world_size}; use backend zero")
        return LocalEngine(module, config, groups=groups, dtype=dtype)
    from learner.zero import ZeroEngine

    ranks = (rank, world_size)
    return ZeroEngine(
        module, config, stage=zero_stage, ranks=ranks, groups=groups, dtype=dtype, offloads=offloads, device=device
    )
