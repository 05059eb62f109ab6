"""The optimizer seam on DeepSpeed ZeRO: the only module that imports deepspeed.

What differs from a plain use of DeepSpeed:

* micro-batches are ours (`managed_gradient_accumulation: false`), so their number may change from update to update;
* DeepSpeed averages gradients over ranks, the seam wants their sum: every loss is multiplied by the number of ranks;
* the inner AdamW has a guard, so that a non-finite loss on one rank stops the update on all of them, in every stage;
* Adam's moments exist from the start, so that a saved state can be loaded before the first update;
* nothing is compiled at start (`platform` builds of DeepSpeed's operators take a minute or more on a CPU).
"""

import atexit
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from learner.config import OptimizerConfig
from learner.optimizer import NonFiniteError, ParameterGroup, adamw_groups

MOMENTS = ("exp_avg", "exp_avg_sq")


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that can be told to sit an update out, and counts whether it was asked at all."""

    is_blocked = False
    num_calls = 0

    def step(self, closure: Any = None) -> None:
        """Update, unless blocked."""
        self.num_calls += 1
        if not self.is_blocked:
            super().step(closure)


class ZeroEngine:
    """`OptimizerEngine` on DeepSpeed, ZeRO stage 0 to 3, float32 or bfloat16 with float32 master weights."""

    def __init__(
        self,
        module: nn.Module,
        config: OptimizerConfig,
        *,
        stage: int,
        ranks: tuple[int, int] = (0, 1),
        groups: Sequence[ParameterGroup] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rank, self.world_size = ranks
        self._device = next(module.parameters()).device
        self._deepspeed = _load_deepspeed(self._device)
        join_group(self.rank, self.world_size, self._device)
        self._stage = stage
        self._max_grad_norm = config.max_grad_norm
        self._num_updates = 0
        self._is_finite = True
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._adamw = GuardedAdamW(adamw_groups(trained, groups, config), betas=config.betas, eps=config.eps)
        self._engine, *_ = self._deepspeed.initialize(
            model=module, optimizer=self._adamw, config=deepspeed_config(config, stage=stage, dtype=dtype)
        )
        self.module = self._engine.module
        self._parameters = trained
        self._masters = _masters(self._engine, self._adamw, stage=stage, dtype=dtype)
        self._create_moments()

    @property
    def num_updates(self) -> int:
        """Optimizer updates so far."""
        return self._num_updates

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module through DeepSpeed, which gathers sharded parameters."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients; a non-finite loss still runs, so that all ranks stay in step, and blocks the update."""
        self._is_finite &= bool(torch.isfinite(loss.detach()))
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Clip, update, zero the gradients; return the norm before clipping."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate * group["scale"]
        flag = torch.tensor(0.0 if self._is_finite else 1.0)
        norm, is_applied = self._run_step(is_blocked=bool(self.all_reduce(flag, "max") > 0))
        if not is_applied:
            raise NonFiniteError(
                f"loss and gradient must be finite on all {self.world_size} ranks, got gradient norm {norm}; "
                "the update was skipped"
            )
        self._num_updates += 1
        return norm

    def discard(self) -> None:
        """Drop the accumulated gradients, on all ranks."""
        self._run_step(is_blocked=True)

    def _run_step(self, *, is_blocked: bool) -> tuple[float, bool]:
        """Let DeepSpeed reduce, clip, update and clean up; return the norm and whether parameters changed."""
        self._adamw.is_blocked = is_blocked
        self._adamw.num_calls = 0
        norm = math.nan
        if self._stage == 0 and self._masters is None:
            pass
        self._engine.step()
        self._is_finite = True
        return norm, not is_blocked and self._adamw.num_calls > 0
