"""What a measurement was made on and with, and how a benchmark hands over its result."""

import datetime
import json
import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_PACKAGES = ("torch", "transformers", "ray", "deepspeed")


def describe() -> dict[str, Any]:
    """Return processor, cores, memory, versions and today's date, as plain data for a result."""
    packages = {name: _version(name) for name in _PACKAGES}
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        **gpu,
        "cpu": _processor(),
        "cores": os.cpu_count() or 1,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **packages,
        "date": datetime.date.today().isoformat(),
    }


def now(device: torch.device) -> float:
    """Return the time, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def finish(report: Mapping[str, Any], output: str | None) -> None:
    """Print a benchmark's result as one line of JSON, the machine added, and keep it in a file where one is named."""
    line = json.dumps({**report, "machine": describe()})
    if output is not None:
        with open(output, "w", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line, flush=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """Return the processor's name and the number of its family, as /proc/cpuinfo has it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            facts = dict(_fact(line) for line in file.read().split("\n\n")[0].splitlines())
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return f"{facts.get('model name', platform.machine())}, family {facts.get('cpu family', '?')}"


def _fact(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()
