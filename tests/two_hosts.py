"""Two hosts for tests: processes that call functions, each with a network, a name and an /etc/hosts of its own.

They are joined by one cable.  What a laptop's loopback interface hides is there: a name that stands for 127.0.1.1, as
Debian installs it, and an interface that leads nowhere and has the same address on both, as Docker's.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

_NEW_MOUNTS, _NEW_NAME, _NEW_NETWORK = 0x00020000, 0x04000000, 0x40000000  # of unshare(2)
_BIND, _PRIVATE_BELOW = 4096, 0x4000 | 0x40000  # of mount(2)
_DEATH_SIGNAL = 1  # of prctl(2)


@dataclass(frozen=True, kw_only=True)
class Host:
    """One process, in which one function runs at a time."""

    address: str
    _process: ProcessPoolExecutor

    def begin(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Run a module's function there; both must be picklable."""
        return self._process.submit(function, *arguments)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function to its end."""
        return self.begin(function, *arguments).result(60)


@contextmanager
def two_processes() -> Iterator[tuple[Host, Host]]:
    """Yield two processes of this host."""
    with ExitStack() as stack:
        yield _host(stack, "127.0.0.1"), _host(stack, "127.0.0.1")


@contextmanager
def two_hosts(first: str, second: str) -> Iterator[tuple[Host, Host]]:
    """Yield two hosts with these addresses; both see a cable `net0`.

    Raises:
        OSError: saying why this machine cannot have them.
    """
    if not shutil.which("ip"):
        raise OSError("no program ip")
    with ExitStack() as stack:
        hosts = [_host(stack, address) for address in (first, second)]
        pids = [str(host.run(_leave, name)) for name, host in zip(("host-a", "host-b"), hosts, strict=True)]
        _ip("link", "add", "net0", "netns", pids[0], "type", "veth", "peer", "name", "net0", "netns", pids[1])
        for host in hosts:
            host.run(_connect, host.address)
        yield hosts[0], hosts[1]


def pull_out() -> None:
    """Take this host's end out of the cable's other end."""
    _ip("link", "set", "net0", "down")


def plug_in(address: str) -> None:
    """Put it back."""
    _bring_up("net0", address)


def _host(stack: ExitStack, address: str) -> Host:
    # Not forked from this process, which may be in a process group; what takes long to load is loaded once for all.
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "transformers.models.llama.modeling_llama"])
    process = ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent)
    stack.callback(process.shutdown, cancel_futures=True)
    return Host(address=address, _process=process)


def _end_with_parent() -> None:
    _call("prctl", _DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def _leave(name: str) -> int:
    """Leave the network that this process was born in."""
    _call("unshare", _NEW_MOUNTS | _NEW_NAME | _NEW_NETWORK)
    socket.sethostname(name)
    _call("mount", None, b"/", None, _PRIVATE_BELOW, None)
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        file.flush()
        _call("mount", file.name.encode(), b"/etc/hosts", None, _BIND, None)
    return os.getpid()


def _connect(address: str) -> None:
    _ip("link", "set", "lo", "up")
    _ip("link", "add", "bridge0", "type", "bridge")
    _bring_up("bridge0", "172.17.0.1")
    _bring_up("net0", address)


def _bring_up(interface: str, address: str) -> None:
    _ip("link", "set", interface, "up")
    of_version = ("/64", "nodad") if ":" in address else ("/24",)
    _ip("addr", "replace", address + of_version[0], "dev", interface, *of_version[1:])


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _call(name: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
