"""Who may write to a run directory: one process at a time, and only with the run's own configuration."""

from typing import Any

from cluster.config import ConfigError, RunConfig, load, to_yaml
from cluster.lock import Lock, TakenError
from cluster.storage import RunStorage

OPERATIONAL = frozenset(
    {
        "run.dir", "run.checkpoint_every", "run.keep_checkpoints", "run.trackers", "pipeline.timeout_s",
        "pipeline.heartbeat_s", "pipeline.max_restarts", "pipeline.max_retries", "pipeline.max_quarantined",
        "rollouts.num_workers", "rollouts.max_workers", "rollouts.tensor_parallel", "reward.num_workers",
        "learner.backend", "learner.num_ranks", "learner.zero_stage",
    }
)  # fmt: skip
"""Settings (and all of `placement`) that change where and how work is done, not what is learnt: a run may be continued
with others."""


def claim(storage: RunStorage, config: RunConfig) -> Lock:
    """Lock the run directory and write the resolved configuration; return the lock, which is free when it is closed.

    Raises:
        ConfigError: when another process has the directory, or it holds a run with another configuration.
    """
    try:
        lock = storage.lock()
    except TakenError as error:
        raise ConfigError(
            f"run.dir {storage.shown()} must belong to one process, and process {error} is writing to it; "
            "wait for it, end it, or choose another run.dir"
        ) from error
    try:
        _compare(storage, config)
        storage.write_text(to_yaml(config), "config.yaml")
    except BaseException:
        lock.close()
        raise
    return lock


def learning_changes(before: RunConfig, now: RunConfig) -> list[str]:
    """Return the settings that differ and are not operational, each as `name before -> now`."""
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return [
        f"{name} {old.get(name)!r} -> {new.get(name)!r}"
        for name in names
        if name not in OPERATIONAL and not name.startswith("placement.")
    ]


def _compare(storage: RunStorage, config: RunConfig) -> None:
    has_begun = bool(storage.checkpoints()) or storage.exists("metrics.jsonl")
    if not (has_begun and storage.exists("config.yaml")):
        return
    changes = learning_changes(load(RunConfig, storage.path("config.yaml")), config)
    if changes:
        raise ConfigError(
            f"run.dir {storage.shown()} holds a run with another configuration ({', '.join(changes)}); "
            "choose another run.dir, or continue the run with its own settings"
        )


def _flat(section: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(section, dict):
        return {prefix.removesuffix("."): section}
    return {name: value for key, part in section.items() for name, value in _flat(part, f"{prefix}{key}.").items()}
