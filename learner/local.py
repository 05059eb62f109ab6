"""The optimizer seam in plain torch, one process: tests, parity with DeepSpeed, machines without it.

Parameters of a module in half precision have float32 master copies, as DeepSpeed's have: gradients accumulate in the
masters, the update happens there, and the module's parameters are rounded copies.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from learner.optimizer import NonFiniteError, ParameterGroup, adamw_groups, clip

if TYPE_CHECKING:
    from learner.config import OptimizerConfig


class LocalEngine:
    """`OptimizerEngine` for one process: AdamW, global norm clipping, float32 master weights."""

    rank = 0
    world_size = 1

    def __init__(
        self,
        module: nn.Module,
        config: "OptimizerConfig",
        *,
        groups: Sequence[ParameterGroup] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.module = module.to(dtype)
        self._device = next(module.parameters()).device
        self._max_grad_norm = config.max_grad_norm
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._masters = {name: _master(p) for name, p in self._parameters.items()}
        self._optimizer = torch.optim.AdamW(
            adamw_groups(self._masters, groups, config), betas=config.betas, eps=config.eps, fused=True
        )
        self._num_updates = 0
        self._is_finite = True
        self._is_offloaded = False

    @property
    def num_updates(self) -> int:
        """Optimizer updates so far."""
        return self._num_updates

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of `loss` in the masters."""
        self._is_finite &= bool(torch.isfinite(loss.detach()))
        loss.backward()
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if master is not parameter and parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def step(self, learning_rate: float) -> float:
        """Clip, update, zero the gradients; return the norm before clipping."""
        norm = clip(list(self._masters.values()), self._max_grad_norm)
        if not (self._is_finite and math.isfinite(norm)):
            self.discard()
            raise NonFiniteError(f"loss and gradient must be finite, got gradient norm {norm}; the update was skipped")
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["scale"]
        self._optimizer.step()
        self._num_updates += 1
        self._round_masters()
        self.discard()
        return norm

    def discard(self) -> None:
        """Drop the accumulated gradients."""
        self._optimizer.zero_grad(set_to_none=True)
        self._is_finite = True

    def all_reduce(self, values: torch.Tensor, operation: str = "sum") -> torch.Tensor:
        """Return `values`: there is one rank."""
        return values

    def all_gather(self, value: Any) -> list[Any]:
        """Return `[value]`: there is one rank."""
        return [value]

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Return an empty context: nothing is sharded."""
        return nullcontext()

    def full_state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yield name -> `param`, `exp_avg`, `exp_avg_sq` of every trained parameter."""
        for name, master in self._masters.items():
            state = self._optimizer.state.get(master, {})
            zeros = torch.zeros_like(master)
            moments = {key: state.get(key, zeros).clone() for key in ("exp_avg", "exp_avg_sq")}
            yield name, {"param": master.detach().clone(), **moments}

    def load_full_state(self, state: Mapping[str, Mapping[str, torch.Tensor]], num_updates: int) -> None:
        """Set parameters, moments and the update count."""
        for name, master in self._masters.items():
            saved = state[name]
            with torch.no_grad():
                master.copy_(saved["param"])
            moments = {key: saved[key].to(master.device, copy=True) for key in ("exp_avg", "exp_avg_sq")}
            step = torch.tensor(float(num_updates), device=master.device)
            self._optimizer.state[master] = {"step": step, **moments}
        self._num_updates = num_updates
        self._round_masters()

    def offload(self) -> None:
        """Move parameters, masters and moments to main memory."""
        self._move(torch.device("cpu"))
        self._is_offloaded = True

    def reload(self) -> None:
        """Move them back."""
        if self._is_offloaded:  # asked before every step
            self._move(self._device)
            self._is_offloaded = False

    def close(self) -> None:
        """Drop gradients and optimizer state."""
        self.discard()
        self._optimizer.state.clear()

    def _move(self, device: torch.device) -> None:
        for tensor in chain(self.module.parameters(), self.module.buffers(), self._masters.values()):
            tensor.data = tensor.data.to(device)
        for moments in self._optimizer.state.values():
            for tensor in moments.values():
                tensor.data = tensor.data.to(device)

    def _round_masters(self) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if self._masters[name] is not parameter:
                    parameter.copy_(self._masters[name])


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return nn.Parameter(parameter.detach().float())
