"""A real Ray cluster with its job server, and `concord` in processes of its own: what a person at a terminal has."""

import http.client
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RAY = str(Path(sys.executable).parent / "ray")
_OPTIONS = (
    "--block", "--num-cpus=2", "--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0",
    "--object-store-memory=300000000", "--disable-usage-stats",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class JobCluster:
    """Where the cluster's job server listens, the token it asks for, and what its nodes are started with."""

    address: str
    token: str
    gcs_address: str
    directory: Path
    variables: Mapping[str, str]

    def concord(self, *arguments: str, cwd: Path = ROOT, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end."""
        return subprocess.run(
            [sys.executable, "-m", "cluster.cli", *arguments],
            capture_output=True,
            text=True,
            cwd=cwd,
            env=self.environment | variables,
            timeout=400,
        )

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables of a shell with the token, where Concord can be imported; RAY_AUTH_MODE is not set."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return kept | {"RAY_AUTH_TOKEN": self.token, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}

    @contextmanager
    def node(self, *options: str) -> Iterator[None]:
        """Have one more node with 2 CPUs in the cluster; it is gone afterwards."""
        # In one directory, nodes would delete each other's copies of working directories.
        own = Path(tempfile.mkdtemp(prefix="n-", dir=self.directory))
        command = [RAY, "start", f"--address={self.gcs_address}", f"--temp-dir={own}", *_OPTIONS, *options]
        with _started(command, self.variables, self.directory / f"{own.name}.log") as log:
            wait_for(lambda: "Ray runtime started" in log())
            yield


@contextmanager
def job_cluster() -> Iterator[JobCluster]:
    """Start `ray start --head` by its path, where `python` is another one, without Ray; end it afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="cj-"))  # short: sockets' names have a limit
    port, dashboard, client = _free_ports(3)
    (directory / "bin").mkdir()
    for name in ("python", "python3"):
        (directory / "bin" / name).symlink_to(getattr(sys, "_base_executable", sys.executable))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VIRTUAL_ENV", "PYTHON"))}
    token = secrets.token_hex(16)
    variables = kept | {
        "PATH": f"{directory / 'bin'}:/usr/bin:/bin",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "CONCORD_CACHE": str(directory / "cache"),
    }
    ports = (f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}")
    command = [RAY, "start", "--head", f"--temp-dir={directory / 'ray'}", *ports, *_OPTIONS]
    try:
        with _started(command, variables, directory / "head.log"):
            wait_for(lambda: _answers(dashboard, token))
            yield JobCluster(
                address=f"http://127.0.0.1:{dashboard}",
                token=token,
                gcs_address=f"127.0.0.1:{port}",
                directory=directory,
                variables=variables,
            )
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def wait_for(is_so: Callable[[], bool], timeout_s: float = 200.0) -> None:
    """Wait until something is so, and fail if it is not in time."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"it must be so within {timeout_s:g} s"
        time.sleep(0.3)


@contextmanager
def _started(command: list[str], variables: Mapping[str, str], path: Path) -> Iterator[Callable[[], str]]:
    """Have a command run in a process group of its own, and yield what reads its output; end the group afterwards."""
    with open(path, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, env=variables, cwd=path.parent, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def log() -> str:
        text = path.read_text(encoding="utf-8")
        assert process.poll() is None, f"{command} has ended:\n{text}"
        return text

    try:
        yield log
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):  # what is left of the processes that it has started
            os.killpg(process.pid, signal.SIGKILL)


def _answers(port: int, token: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/api/jobs/", headers={"Authorization": f"Bearer {token}"})
        return connection.getresponse().status == 200
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
