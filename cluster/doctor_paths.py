"""Whether every node of a cluster sees the directories that its processes read and write.

The driver hands paths to workers, which open them on their own node.  Where a cluster answers, each node is asked;
where there is one and it is not asked, the kind of file system tells whether a path can be there at all.
"""

import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from actors.cache import cache_directory
from cluster.checks import check_store
from cluster.config import ConfigError, RunConfig
from cluster.findings import Finding
from cluster.model_config import find_directory
from cluster.object_store import ObjectStore, is_url

_SHARED = frozenset(
    [
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "gfs2",
        "glusterfs",
        "gpfs",
        "lustre",
        "nfs",
        "nfs4",
        "ocfs2",
        "orangefs",
        "smb3",
        "smbfs",
        "virtiofs",
        "wekafs",
    ]
)
"""File systems that several machines can mount; so can those of fuse."""

_ANSWER_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A path that workers need."""

    setting: str
    path: str
    is_written: bool
    """Whether it is a directory that may not exist yet, and that ranks or workers write to."""


def places_of(config: RunConfig) -> list[Place]:
    """Return the local paths that a run's workers need; models by hub name are not paths."""
    places = []
    if not is_url(config.run.dir):  # with a URL, each host has a cache of its own
        places.append(Place(setting="run.dir", path=config.run.dir, is_written=True))
        places.append(Place(setting="CONCORD_CACHE", path=cache_directory(), is_written=True))
    if isinstance(config.policy.model, str):
        places.append(Place(setting="policy.model", path=config.policy.model, is_written=False))
    for name, component in config.reward.components.items():
        for model in [*([component.model] if component.model else []), *component.ensemble]:
            places.append(Place(setting=f"reward.components.{name}.model", path=model, is_written=False))
    return [place for place in places if place.is_written or os.path.isdir(place.path) or not _is_hub_name(place.path)]


def check_hub(config: RunConfig, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield models that would have to be downloaded where that is forbidden."""
    offline = environment.get("HF_HUB_OFFLINE", "") not in ("", "0")
    models = [config.policy.model] if isinstance(config.policy.model, str) else []
    models += [component.model for component in config.reward.components.values() if component.model]
    for model in models:
        if _is_hub_name(model) and find_directory(model) is None:
            yield Finding(
                level="fail" if offline else "warn",
                about=model,
                found="is not on this machine"
                + (", and HF_HUB_OFFLINE is set" if offline else ", and is downloaded first"),
                remedy="download it on every node, or name a directory that all nodes mount",
            )


def check_object_store(url: str) -> Iterator[Finding]:
    """Yield whether this machine can write below a URL: it puts an object there and deletes it."""
    for problem in check_store(url):
        found, _, remedy = problem.partition(";")
        yield Finding(level="fail", about="run.dir", found=found, remedy=remedy.strip() or "name another URL")
        return
    key, started = f".concord-doctor-{uuid.uuid4().hex}", time.monotonic()
    store = ObjectStore(url)
    try:
        store.write(key, b"")
        store.delete(key)
    except OSError as error:
        yield Finding(
            level="fail",
            about="run.dir",
            found=f"nothing can be written there: {error}",
            remedy="look at the store's credentials in the environment (S3: AWS_PROFILE or AWS_ACCESS_KEY_ID, ...), "
            "and at the bucket's name and region",
        )
    else:
        took = time.monotonic() - started
        yield Finding(level="ok", about="run.dir", found=f"{store.shown()} takes and deletes an object in {took:.2f} s")


def check_local(places: list[Place]) -> Iterator[Finding]:
    """Yield models that are not on this very machine."""
    for place in places:
        if place.is_written:
            continue
        if os.path.isfile(os.path.join(place.path, "config.json")):
            yield Finding(level="ok", about=place.setting, found=place.path)
        else:
            yield Finding(
                level="fail",
                about=place.setting,
                found=f"{place.path!r} is no model directory here",
                remedy="name a directory with a config.json, or a hub name like owner/name",
            )


def check_mounts(places: list[Place], mounts: Mapping[str, str]) -> Iterator[Finding]:
    """Yield paths on file systems of this machine alone, which workers on other nodes cannot see.

    Args:
        places: what workers need.
        mounts: mount point -> kind of file system.
    """
    for place in places:
        path = os.path.realpath(place.path)
        kind = (
            mounts[max((point for point in mounts if _is_under(path, point)), key=len, default="/")] if mounts else ""
        )
        if kind and not (kind in _SHARED or kind.startswith("fuse")):
            yield Finding(
                level="warn",
                about=place.setting,
                found=f"{path} is on {kind}, which other nodes do not see",
                remedy="use a directory that all nodes mount, or check with --address what they see",
            )


def check_seen(places: list[Place], seen: Mapping[str, frozenset[str] | None]) -> Iterator[Finding]:
    """Yield paths that a node does not see.

    Args:
        places: what workers need.
        seen: node -> the settings whose paths it sees; None where it did not answer.
    """
    for node, settings in seen.items():
        if settings is None:
            yield Finding(
                level="fail",
                about=f"node {node}",
                found=f"did not answer within {_ANSWER_S:g} s",
                remedy="look at `ray status`, and whether Python and Concord's packages are the same there",
            )
    for place in places:
        blind = [node for node, settings in seen.items() if settings is not None and place.setting not in settings]
        if blind:
            yield Finding(
                level="fail",
                about=place.setting,
                found=f"{os.path.abspath(place.path)} is not seen by {', '.join(blind[:3])}"
                + (f" and {len(blind) - 3} more nodes" if len(blind) > 3 else ""),
                remedy="use a directory that all nodes mount, the same path everywhere",
            )
        elif seen:
            yield Finding(level="ok", about=place.setting, found=f"{os.path.abspath(place.path)}, seen by all nodes")


def ask_nodes(address: str, places: list[Place]) -> dict[str, frozenset[str] | None]:
    """Join a cluster and have every node look for the paths; return node -> the settings whose paths it sees.

    A directory that is written to is looked for by a file that is put there meanwhile: another directory of the same
    name on another disk does not count.

    Raises:
        ConfigError: when there is no such cluster.
    """
    import logging

    import ray

    joined = not ray.is_initialized()
    if joined:
        try:
            ray.init(address=address, namespace="concord", log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"--address must be a Ray cluster that answers, got {address!r} ({str(error).splitlines()[0]})"
            ) from error
    probes: list[str] = []
    try:
        return _ask(_wanted(places, probes))
    finally:
        for probe in probes:
            os.unlink(probe)
        if joined:
            ray.shutdown()


def mounts() -> dict[str, str]:
    """Return mount point -> kind of file system of this machine, nothing where the system does not say."""
    try:
        with open("/proc/mounts", encoding="utf-8") as file:
            return {point: kind for _, point, kind, *_ in map(str.split, file)}
    except OSError:
        return {}


def _wanted(places: list[Place], probes: list[str]) -> dict[str, str]:
    """Return setting -> the path to look for; files that were made for it are added to `probes`."""
    wanted = {}
    for place in places:
        path = os.path.abspath(place.path)
        if place.is_written:
            while not os.path.isdir(path):
                path = os.path.dirname(path)
            path = os.path.join(path, f".concord-doctor-{uuid.uuid4().hex}")
            try:
                with open(path, "x", encoding="ascii"):
                    probes.append(path)
            except OSError:  # nobody can write there, which the check of disks says
                continue
        wanted[place.setting] = path
    return wanted


def _ask(wanted: Mapping[str, str]) -> dict[str, frozenset[str] | None]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    calls = {}
    for node in ray.nodes():
        if node["Alive"]:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": strategy}
            task: Any = ray.remote(**options)(_seen)
            calls[f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"] = task.remote(dict(wanted))
    ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=_ANSWER_S)
    answers: dict[str, frozenset[str] | None] = {}
    for name, call in calls.items():
        try:
            answers[name] = frozenset(ray.get(call)) if call in ready else None
        except ray.exceptions.RayError:
            answers[name] = None
    return answers


def _seen(wanted: dict[str, str]) -> list[str]:
    """On a node: return the settings whose paths are there."""
    return [setting for setting, path in wanted.items() if os.path.exists(path)]


def _is_hub_name(model: str) -> bool:
    return not os.path.isdir(model) and model.count("/") == 1 and not model.startswith((".", "/", "~"))


def _is_under(path: str, point: str) -> bool:
    return path == point or path.startswith(point.rstrip("/") + "/")
