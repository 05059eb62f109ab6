"""TRL's side of `benchmarks.trl`, seen from Concord's: an environment with one version of it, and a process to ask."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from actors.cache import build_once
from benchmarks.trl_workload import THREADS

ROOT = Path(__file__).parent.parent
TRL_NEEDS = ("accelerate", "datasets", "pandas", "rich")


class PeerError(RuntimeError):
    """TRL could not be prepared or did not do its part."""


class Trl:
    """TRL's trainer in a process of its own, which makes one iteration when asked.  Use as a context manager.

    Args:
        environment: directory with the right version of TRL.
        job: what `benchmarks.trl_theirs` reads.
        directory: for its files.
    """

    def __init__(self, environment: str, job: dict[str, Any], directory: str) -> None:
        path = os.path.join(directory, "job.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(job, file)
        self._log = os.path.join(directory, "trl.log")
        variables = {name: value for name, value in os.environ.items() if name not in ("MKL_CBWR", "OMP_WAIT_POLICY")}
        variables |= {
            "PYTHONPATH": os.pathsep.join([environment, str(ROOT)]),
            "OMP_NUM_THREADS": str(THREADS),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TRL_EXPERIMENTAL_SILENCE": "1",
        }
        with open(self._log, "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.trl_theirs", path],
                cwd=ROOT,
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.pid = self._process.pid
        self.ready = self._answer()

    def __enter__(self) -> "Trl":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()

    def step(self) -> dict[str, Any]:
        """Make an iteration; return what it took and saw."""
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._answer()

    def processes(self) -> list[psutil.Process]:
        """Return the process, as a list of one."""
        return [psutil.Process(self.pid)]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "it is a pipe"
        line = self._process.stdout.readline()
        if not line:
            text = Path(self._log).read_text(encoding="utf-8")[-3000:]
            raise PeerError(f"TRL's process must answer, and ended; the end of what it printed:\n{text}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def trl_environment(version: str, parent: str) -> str:
    """Return a directory that holds one version of TRL and nothing else, installed if it is not there.

    Raises:
        PeerError: if it cannot be installed, or what it needs beside itself is missing.
    """
    missing = [name for name in TRL_NEEDS if find_spec(name) is None]
    if missing:
        raise PeerError(f"TRL needs {', '.join(missing)}, which are not installed; install Concord's extra `test`")

    def install(directory: str) -> None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", directory]
        done = subprocess.run([*command, f"trl=={version}"], capture_output=True, text=True)
        if done.returncode:
            raise PeerError(
                f"pip must be able to install trl=={version} into {parent}, got:\n{done.stderr[-1000:]}\nmake the "
                "package index reachable, or name a directory that has it with --environments"
            )

    return build_once(os.path.join(parent, f"trl-{version}"), install)
