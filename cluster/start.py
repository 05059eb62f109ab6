"""The policy a run starts from: a given model, random weights, or a supervised start, trained once and cached."""

import hashlib
import inspect
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from actors.cache import cache_directory, content_hash, locked
from actors.config import PolicyConfig
from actors.plugins import import_function
from cluster.config import ConfigError, read_yaml, validate
from cluster.deliveries import delivered
from cluster.hardware import live_nodes
from cluster.placement import Processes, enclosing_group, gang_group
from cluster.places import ask_for
from learner.config import DataConfig, SFTConfig


def start_config(policy: PolicyConfig) -> SFTConfig | None:
    """Return the supervised start's configuration with its overrides applied, or None where there is none.

    The policy's own `model` wins over the one in the start's file.

    Raises:
        ConfigError: as for any configuration, so that it can be checked before anything starts.
    """
    start = policy.start
    if start is None:
        return None
    if not os.path.isfile(start.config):
        raise ConfigError(f"policy.start.config must be a YAML file, got {start.config!r}; check the working directory")
    model = policy.model if isinstance(policy.model, str) else policy.model.model_dump()
    raw = read_yaml(start.config, start.set)
    section = raw.get("policy") or {}
    if not isinstance(section, dict):
        raise ConfigError(f"{start.config} (policy.start): policy must hold settings, got {section!r}")
    raw["policy"] = {**section, "model": model}
    return validate(SFTConfig, raw, where=f"{start.config} (policy.start)")


def prepare_policy(policy: PolicyConfig, *, seed: int, train: Callable[[SFTConfig], None]) -> str:
    """Return a local model directory; `train` makes the supervised start if it is not cached yet."""
    from actors.policy import materialize

    sft = start_config(policy)
    if sft is None:
        return materialize(policy, seed=seed, cache_dir=cache_directory())
    # Named by its settings and its data's content.
    key = content_hash(sft.model_dump(mode="json", exclude={"output"}), _content(sft.data))
    output = os.path.join(cache_directory(), "sft", key)
    with locked(output):
        if not os.path.isfile(os.path.join(output, "config.json")):
            train(sft.model_copy(update={"output": output}))
    return output


def train_start(sft: SFTConfig, *, learner: Processes, ready_timeout_s: float) -> None:
    """Train a supervised start in a process of its own, in a learner rank's place; in a Tune trial, in that of rank 0.

    Raises:
        PlacementError: when the cluster has no such place in time.
    """
    import ray
    from ray.util.placement_group import remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from cluster.pool import fetch

    trial = enclosing_group()
    wanted = gang_group(replace(learner, count=1), guests=None, nodes=live_nodes())
    group = ask_for(wanted, timeout_s=ready_timeout_s) if trial is None else trial
    options: dict[str, Any] = {
        "num_cpus": learner.cpus,
        "num_gpus": learner.gpus,
        "max_retries": 0,
        "max_calls": 1,  # the process ends with the task and gives its memory back
        "runtime_env": {"env_vars": learner.environment},
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
    }
    try:
        task = ray.remote(**options)(_sft_task)
        fetch(task.remote(sft, learner.threads, cache_directory()), what="the supervised start", timeout_s=None)
    finally:
        if trial is None:
            remove_placement_group(group)


def _sft_task(sft: SFTConfig, num_threads: int, cache_dir: str) -> None:
    from learner.sft import train

    training = sft.training.model_copy(update={"num_threads": sft.training.num_threads or num_threads})
    with delivered(sft.output, has_hashes=True) as output:
        train(sft.model_copy(update={"training": training, "output": output}), cache_dir=cache_dir)


def _content(data: DataConfig) -> str:
    """Return a hash of what a data section stands for: the files' bytes, or the writing function's source."""
    digest = hashlib.sha256()
    for path in _files(data):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _files(data: DataConfig) -> list[str]:
    if data.make is not None:
        function = import_function(data.make.function)
        return [inspect.getfile(function)]
    path = data.path or ""
    if os.path.isdir(path):
        return sorted(os.path.join(root, name) for root, _, names in os.walk(path) for name in names)
    return [path] if os.path.isfile(path) else []
