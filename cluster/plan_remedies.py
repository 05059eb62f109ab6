"""Settings with which processes fit that do not fit as they are: each one is tried out before it is proposed."""

from collections.abc import Iterator, Mapping
from typing import Any

from cluster.config import ConfigError, RunConfig, validate
from cluster.memory_plan import Sizes, vllm_rows
from cluster.plan_layout import Layout, device_need, lay_out

FULL_SHARE = 0.9
"""Of a GPU's memory that may be planned for without a warning."""

_MAX_PROPOSED = 3

Overrides = Mapping[str, Any]


def remedy(layout: Layout, sizes: Sizes, role: str) -> str:
    """Return the settings with which a role's processes fit, each tried; the first three that do."""
    works: list[Overrides] = []
    for change in _CHANGES[role](layout.config):
        if any(enough.items() <= change.items() for enough in works):
            continue
        try:
            config = _changed(layout.config, change)
        except ConfigError:
            continue
        other = lay_out(config, layout.hardware, sizes)
        if _fits(other, role):
            works.append(change)
        if len(works) == _MAX_PROPOSED:
            break
    if works:
        return f"it fits with {', or '.join(map(_written, works))}"
    return "none of the settings tried makes it fit on this hardware; use larger GPUs, more of them, or a smaller model"


def _fits(layout: Layout, role: str) -> bool:
    if any(found.shortage for found in layout.fits):
        return False
    memory = layout.memory_of(role)
    if not memory.device:
        return all(node.memory_bytes is None or memory.host_bytes < node.memory_bytes for node in layout.nodes_of(role))
    need, budget = device_need(layout, role)
    if budget is None:
        return False
    if role == "rollout" and layout.config.rollouts.engine == "vllm":
        return vllm_rows(layout.config, memory, budget) > 0
    return need <= FULL_SHARE * budget


def _learner_changes(config: RunConfig) -> Iterator[Overrides]:
    ranks = config.learner.num_ranks
    yield {"learner.zero_stage": 2}
    yield {"learner.zero_stage": 3}
    yield {"learner.gradient_checkpointing": True}
    yield {"learner.zero_stage": 3, "learner.gradient_checkpointing": True}
    yield {"learner.offload": "optimizer"}
    yield {"learner.zero_stage": 3, "learner.gradient_checkpointing": True, "learner.offload": "optimizer"}
    yield {"learner.critic": "trunk"}
    for factor in (2, 4, 8):
        yield {"learner.num_ranks": factor * ranks}
        yield {"learner.num_ranks": factor * ranks, "learner.zero_stage": 3, "learner.gradient_checkpointing": True}
    yield {"learner.microbatch_tokens": max(1, config.learner.microbatch_tokens // 4)}
    yield {"learner.lora.rank": 16}
    yield {"learner.lora.rank": 16, "learner.zero_stage": 3, "learner.gradient_checkpointing": True}


def _rollout_changes(config: RunConfig) -> Iterator[Overrides]:
    rows, workers = config.rollouts.max_rows, config.rollouts.num_workers * config.rollouts.tensor_parallel
    for divisor in (2, 4, 8):
        yield {"rollouts.max_rows": max(4, rows // divisor // 4 * 4)}
    yield {"placement.rollout_gpus": 1.0}
    for parts in (2, 4, 8):
        yield {
            "rollouts.engine": "vllm",
            "rollouts.tensor_parallel": parts,
            "rollouts.num_workers": max(1, workers // parts),
            "placement.rollout_gpus": 1.0,
        }


def _reward_changes(config: RunConfig) -> Iterator[Overrides]:
    yield {"placement.reward_gpus": 1.0}
    yield {"placement.reward_gpus": 1.0, "reward.num_workers": max(1, config.reward.num_workers // 2)}
    if config.algorithm.reference.mode == "fixed" and config.algorithm.kl.coef:
        yield {"algorithm.reference.mode": "base", "learner.lora.rank": 16}
    yield {"placement.reward_gpus": 0.0}


_CHANGES = {"learner": _learner_changes, "rollout": _rollout_changes, "reward": _reward_changes}


def _changed(config: RunConfig, change: Overrides) -> RunConfig:
    """Return a configuration with some settings replaced.

    Raises:
        ConfigError: when they do not go together, or nothing would change.
    """
    raw = config.model_dump(mode="json")
    for name, value in change.items():
        *sections, field = name.split(".")
        target = raw
        for section in sections:
            target[section] = target[section] or {}
            target = target[section]
        target[field] = value
    other = validate(RunConfig, raw, where="plan")
    if other == config:
        raise ConfigError("the settings are those that are set already")
    return other


def _written(change: Overrides) -> str:
    """Return settings as they are written on the command line."""
    return " ".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in change.items()
    )
