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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
_READY_S = 120.0


@dataclass(frozen=True, kw_only=True)
class JobCluster:
    """Where the cluster's job server listens, the token it asks for, and the variables of this side's processes."""

    address: str
    token: str
    cache: str

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
def job_cluster() -> Iterator[JobCluster]:
    """Start `ray start --head` by its path, where `python` is another one, without Ray; end it afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="cj-"))  # short: sockets' names have a limit
    port, dashboard, client = _free_ports(3)
    token = secrets.token_hex(16)
    (directory / "bin").mkdir()
    for name in ("python", "python3"):
        (directory / "bin" / name).symlink_to(getattr(sys, "_base_executable", sys.executable))
    variables = {
        "PATH": f"{directory / 'bin'}:/usr/bin:/bin",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "CONCORD_CACHE": str(directory / "cache"),
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VIRTUAL_ENV", "PYTHON"))}
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
        f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", "--dashboard-agent-listen-port=0",
        "--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=300000000", "--disable-usage-stats",
        f"--temp-dir={directory / 'ray'}",
    ]  # fmt: skip
    with open(directory / "ray.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, env=kept | variables, cwd=directory, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_ready(process, dashboard, token, directory / "ray.log")
        yield JobCluster(address=f"http://127.0.0.1:{dashboard}", token=token, cache=str(directory / "cache"))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            with suppress(ProcessLookupError):  # what is left of the processes that it has started
                os.killpg(process.pid, signal.SIGKILL)
            shutil.rmtree(directory, ignore_errors=True)


def _wait_ready(process: "subprocess.Popen[bytes]", port: int, token: str, log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while True:
        assert process.poll() is None, f"ray start has ended:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"the job server must answer within {_READY_S:g} s:\n{log.read_text()}"
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/api/jobs/", headers={"Authorization": f"Bearer {token}"})
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.3)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
