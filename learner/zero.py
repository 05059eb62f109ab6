"""The optimizer seam on DeepSpeed ZeRO: the only module that imports deepspeed.

What differs from a plain use of DeepSpeed:

* micro-batches are ours (`managed_gradient_accumulation: false`), so their number may change from update to update;
* DeepSpeed averages gradients over ranks, the seam wants their sum: every loss is multiplied by the number of ranks;
* the inner AdamW has a guard, so that a non-finite loss on one rank stops the update on all of them, in every stage;
* Adam's moments exist from the start, so that a saved state can be loaded before the first update;
* nothing is compiled at start: on a CPU, building DeepSpeed's operators takes a minute or more.
"""

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from learner.config import OFFLOADING_STAGES, OptimizerConfig
from learner.optimizer import NonFiniteError, ParameterGroup, adamw_groups, clip
from learner.process_group import join_group

MOMENTS = ("exp_avg", "exp_avg_sq")


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that can be told to sit an update out, and that clips where DeepSpeed does not report the norm."""

    is_blocked = True  # until the engine is built: some stages run an update of zeros then, which would count
    has_updated = False
    clip_norm: float | None = None
    norm = math.nan

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update, unless blocked or the gradient it was asked to clip is not finite."""
        if self.clip_norm is not None:
            parameters = [p for group in self.param_groups for p in group["params"]]
            self.norm = clip(parameters, self.clip_norm)
            if not math.isfinite(self.norm):
                return
        if not self.is_blocked:
            super().step(closure)
            self.has_updated = True


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
        offloads: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.module = module
        self.rank, self.world_size = ranks
        self._device = device or next(module.parameters()).device
        self._deepspeed = _load_deepspeed(self._device)
        join_group(self.rank, self.world_size, self._device)
        self._stage = stage
        self._num_updates = 0
        self._is_finite = True
        self._is_offloaded = False
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._adamw = GuardedAdamW(
            adamw_groups(self._parameters, groups, config), betas=config.betas, eps=config.eps, fused=True
        )
        settings = deepspeed_config(config, stage=stage, dtype=dtype, world_size=self.world_size)
        if offloads:
            pins = self._device.type != "cpu"
            settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": pins}
        if device is not None and stage == 3:
            self._shard(settings)
        with contextlib.redirect_stdout(io.StringIO()):  # some stages print their memory use
            self._engine, *_ = self._deepspeed.initialize(model=module, optimizer=self._adamw, config=settings)
        if stage == 0 and dtype == torch.float32:
            self._adamw.clip_norm = config.max_grad_norm
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
        norm = self._finish(is_blocked=bool(self.all_reduce(flag, "max") > 0))
        if not self._adamw.has_updated:
            raise NonFiniteError(
                f"loss and gradient must be finite on all {self.world_size} ranks, got gradient norm {norm}; "
                "the update was skipped"
            )
        self._num_updates += 1
        return norm

    def discard(self) -> None:
        """Drop the accumulated gradients, on all ranks."""
        self._finish(is_blocked=True)

    def all_reduce(self, values: torch.Tensor, operation: str = "sum") -> torch.Tensor:
        """Return `values` reduced over ranks."""
        reduced = values.detach().to(self._device, copy=True)
        dist.all_reduce(reduced, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[operation])
        return reduced.to(values.device)

    def all_gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Return a context in which sharded parameters are whole, on every rank."""
        return self._deepspeed.zero.GatheredParameters(list(parameters), enabled=self._stage == 3)

    def full_state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yield name -> full float32 `param`, `exp_avg`, `exp_avg_sq`; collective."""
        masters = self._masters()
        for name, parameter in self._parameters.items():
            if masters:
                master = masters[name]
                state = {"param": master.detach(), **{key: self._adamw.state[master][key] for key in MOMENTS}}
            else:
                read = self._deepspeed.utils.safe_get_full_optimizer_state
                state = {key: read(parameter, key) for key in MOMENTS}
                state["param"] = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
            shape = _full_shape(parameter)
            yield name, {key: value.reshape(shape).clone() for key, value in state.items()}

    def load_full_state(self, state: Mapping[str, Mapping[str, torch.Tensor]], num_updates: int) -> None:
        """Set master weights, rounded weights, moments and Adam's step count; collective."""
        masters = self._masters()
        for name, parameter in self._parameters.items():
            saved = {key: value.to(self._device, torch.float32) for key, value in state[name].items()}
            if masters:
                master = masters[name]
                _copy(master, saved["param"])
                for key in MOMENTS:
                    _copy(self._adamw.state[master][key], saved[key])
            else:
                self._set_sharded(parameter, saved)
            # DeepSpeed sets only the masters; what the forward pass reads is another tensor
            with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self._stage == 3):
                _copy(parameter, saved["param"])
        for moments in self._adamw.state.values():
            moments["step"].fill_(float(num_updates))  # bias correction depends on it
        self._num_updates = num_updates

    def offload(self) -> None:
        """Move what is held to main memory, see `LearnerConfig.rests_in_main_memory`."""
        if self._stage in OFFLOADING_STAGES:
            self._engine.offload_states(pin_memory=self._device.type != "cpu")
            self._is_offloaded = True

    def reload(self) -> None:
        """Move it back."""
        if self._is_offloaded:
            self._engine.reload_states()
            # DeepSpeed ties parameters to new fragments of the masters, and would not tie their moments again
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
            self._is_offloaded = False

    def close(self) -> None:
        """Free DeepSpeed's buffers; the process group ends with the process, other engines may use it."""
        self._engine.destroy()

    def _shard(self, settings: dict[str, Any]) -> None:
        """Cut the module's parameters into shards on the device, one after the other, so that it is never whole there.

        DeepSpeed would move the whole module first.
        """
        self._deepspeed.zero.Init(module=self.module, config_dict_or_path=settings)
        for buffer in self.module.buffers():
            buffer.data = buffer.data.to(self._device)

    def _finish(self, *, is_blocked: bool) -> float:
        """Let DeepSpeed reduce, clip, update unless blocked, and clean up; return the norm before clipping."""
        self._adamw.is_blocked = is_blocked
        self._adamw.has_updated = False
        self._engine.step()
        self._is_finite = True
        norm = self._adamw.norm if self._adamw.clip_norm is not None else self._engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def _create_moments(self) -> None:
        """Create Adam's state, which torch would only do in the first update, so that a saved one can be loaded."""
        optimizer = self._engine.optimizer
        flat = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3 keeps them apart from the groups
        masters = flat or [p for group in self._adamw.param_groups for p in group["params"]]
        for master in masters:
            zeros = {key: torch.zeros_like(master, requires_grad=False) for key in MOMENTS}
            self._adamw.state[master] = {"step": torch.tensor(0.0, device=master.device), **zeros}
        if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
            optimizer._lazy_init_hp_params_optimizer_state()

    def _set_sharded(self, parameter: nn.Parameter, saved: Mapping[str, torch.Tensor]) -> None:
        """Set a parameter's float32 master and moments where DeepSpeed shards them."""
        utils = self._deepspeed.utils
        if self._stage != 3:
            utils.safe_set_full_fp32_param(parameter, saved["param"])
            for key in MOMENTS:
                utils.safe_set_full_optimizer_state(parameter, saved[key], key)
            return
        # The full setters cut shards without the padding that evens them out: 3 values on 2 ranks are a, b and c, -
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        shards = {
            key: nn.functional.pad(value.flatten(), (0, size * self.world_size - value.numel())).split(size)[self.rank]
            for key, value in saved.items()
        }
        utils.safe_set_local_fp32_param(parameter, shards["param"])
        for key in MOMENTS:
            utils.safe_set_local_optimizer_state(parameter, shards[key], key)

    def _masters(self) -> dict[str, torch.Tensor]:
        """Return parameter name -> float32 master where nothing is sharded (stage 0), else nothing."""
        if self._stage != 0:
            return {}
        if self._adamw.clip_norm is not None:
            return dict(self._parameters)
        optimizer = self._engine.optimizer
        pairs = zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True)
        master_of = {id(parameter): master for parameter, master in pairs}
        return {name: master_of[id(parameter)] for name, parameter in self._parameters.items()}


ALONE = {"contiguous_gradients": False, "reduce_bucket_size": 20_000_000}
"""For one rank, which reduces nothing: else each micro-batch's gradients are copied into a buffer made for them."""


def deepspeed_config(config: OptimizerConfig, *, stage: int, dtype: torch.dtype, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration; micro-batch sizes are placeholders, as accumulation is not managed by it."""
    alone = ALONE if world_size == 1 and stage in (1, 2) else {}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "overlap_comm": False, **alone},
        "gradient_clipping": config.max_grad_norm,
    }
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
        if stage > 0:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    elif dtype == torch.float32 and stage == 0:
        settings["gradient_clipping"] = 0.0  # GuardedAdamW clips: DeepSpeed would not tell the norm
    elif dtype != torch.float32:
        raise ValueError(f"dtype must be float32 or bfloat16 with DeepSpeed, got {dtype}")
    return settings


def _load_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for this kind of device, without the operator it would compile when ranks first meet."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # its calls, not ours
    operators = getattr(deepspeed.ops, "__compatible_ops__", {})
    if device.type == "cpu" and "deepspeed_shm_comm" in operators:
        operators["deepspeed_shm_comm"] = False  # faster only within one machine, and a minute of compiling
    return deepspeed


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    with torch.no_grad():
        target.copy_(source.reshape(target.shape))
