"""Who may write to a run directory: one process at a time, and only with the run's own configuration."""

import fcntl
import os
from typing import Any, TextIO

from cluster.config import ConfigError, RunConfig, load, to_yaml
from cluster.storage import RunStorage

OPERATIONAL = frozenset(
    {
        "run.dir", "run.checkpoint_every", "run.keep_checkpoints", "pipeline.timeout_s", "rollouts.num_workers",
        "reward.num_workers", "learner.backend", "learner.num_ranks", "learner.zero_stage",
    }
)  # fmt: skip
"""Settings (and all of `placement`) that change where and how work is done, not what is learnt: a run may be continued
with others."""


def claim(storage: RunStorage, config: RunConfig) -> TextIO:
    """Lock the run directory and write the resolved configuration; return the lock, which is free when it is closed.

    Raises:
        ConfigError: when another process has the directory, or it holds a run with another configuration.
    """
    # Closed by the caller: it stays open as long as the run.
    lock = open(storage.path(".lock"), "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read().strip()
        lock.close()
        raise ConfigError(
            f"run.dir {storage.directory} must belong to one process, and process {holder} is writing to it; "
            "wait for it, end it, or choose another run.dir"
        ) from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    try:
        _compare(storage, config)
    except BaseException:
        lock.close()
        raise
    storage.write_text(to_yaml(config), "config.yaml")
    return lock


def _compare(storage: RunStorage, config: RunConfig) -> None:
    has_begun = bool(storage.checkpoints()) or storage.exists("metrics.jsonl")
    if not (has_begun and storage.exists("config.yaml")):
        return
    before = _flat(load(RunConfig, storage.path("config.yaml")).model_dump(mode="json"))
    now = _flat(config.model_dump(mode="json"))
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    changes = [
        f"{name} {before.get(name)!r} -> {now.get(name)!r}"
        for name in names
        if name not in OPERATIONAL and not name.startswith("placement.")
    ]
    if changes:
        raise ConfigError(
            f"run.dir {storage.directory} holds a run with another configuration ({', '.join(changes)}); "
            "choose another run.dir, or continue the run with its own settings"
        )


def _flat(section: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(section, dict):
        return {prefix.removesuffix("."): section}
    return {name: value for key, part in section.items() for name, value in _flat(part, f"{prefix}{key}.").items()}
