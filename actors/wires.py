"""What carries a stream's messages: a group of gloo between hosts, or one of NCCL between GPUs.

Either is made for the streams alone, beside whatever group a process is in already.  Messages begin and end in host
memory, where they are packed and verified; NCCL's pass through device memory on both sides.  gloo's group under the
same staging is NCCL's twin in the tests.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

WireKind = Literal["gloo", "nccl"]

GLOO_INTERFACES = "GLOO_SOCKET_IFNAME"
"""The environment variable that names the network interfaces which gloo is to use on this machine."""

_SENDER = 0
_POLL_S = 2e-4
_GLOO_PATIENCE = 5
"""gloo waits so many times its timeout for a connection that does not come about."""


class Wire(Protocol):
    """A group of processes in which the first one sends."""

    def begin(self, tensor: torch.Tensor) -> Callable[[], None]:
        """Begin to send or receive a tensor on the host, after those before; the result waits for it.

        Both raise RuntimeError when a peer is gone or nothing has moved within the timeout.
        """

    def close(self) -> None:
        """End the group for all members; returns at once."""


def open_wire(kind: WireKind, store: dist.Store, *, rank: int, size: int, timeout_s: float, hostname: str) -> Wire:
    """Return this process's end of a group, whose members are all on their way here.

    NCCL would wait for others without a limit, gloo several times as long as for a message.

    Args:
        kind: what carries it; NCCL uses the current CUDA device, which no other member may have.
        store: of this group alone.
        rank: 0 sends.
        size: of the group.
        timeout_s: for one message.
        hostname: of this machine, as the members see it; gloo uses it where `GLOO_INTERFACES` names nothing else.
    """
    if kind == "gloo":
        return GlooWire(store, rank=rank, size=size, timeout_s=timeout_s, hostname=hostname)
    group = _nccl_group(store, rank=rank, size=size, timeout_s=timeout_s)
    return StagedWire(group, device=_own_device(), is_sender=rank == _SENDER, timeout_s=timeout_s)


class GlooWire:
    """Implements `Wire` over the network of hosts."""

    def __init__(self, store: dist.Store, *, rank: int, size: int, timeout_s: float, hostname: str) -> None:
        self._group: Any = gloo_group(store, rank=rank, size=size, timeout_s=timeout_s, hostname=hostname)
        self._options = _broadcast_options(timeout_s)
        self._last: Any = None

    def begin(self, tensor: torch.Tensor) -> Callable[[], None]:
        """See `Wire`."""
        if self._group is None:
            raise RuntimeError("the group has been given up")
        self._last = self._group.broadcast([tensor], self._options)
        wait: Callable[[], None] = self._last.wait
        return wait

    def close(self) -> None:
        """See `Wire`."""
        # Connections close with the last reference, which waits for what is on its way, at most one timeout.
        last = [self._group, self._last]
        self._group = self._last = None
        threading.Thread(target=last.clear, name="close weights group", daemon=True).start()


class StagedWire:
    """Implements `Wire` for a group whose messages must be in a device's memory.

    Its deadline is its own: that of NCCL ends the process.

    Args:
        group: of processes, on that device.
        device: where messages are staged.
        is_sender: whether this is the first rank.
        timeout_s: for one message.
    """

    def __init__(self, group: Any, *, device: torch.device, is_sender: bool, timeout_s: float) -> None:
        self._group = group
        self._device = device
        self._is_sender = is_sender
        self._timeout_s = timeout_s
        self._options = _broadcast_options(timeout_s)

    def begin(self, tensor: torch.Tensor) -> Callable[[], None]:
        """See `Wire`."""
        if self._group is None:
            raise RuntimeError("the group has been given up")
        staged = (
            tensor.to(self._device, copy=True) if self._is_sender else torch.empty_like(tensor, device=self._device)
        )
        work = self._group.broadcast([staged], self._options)
        deadline = time.monotonic() + self._timeout_s

        def wait() -> None:
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no message within {self._timeout_s:g} s")
                time.sleep(_POLL_S)
            work.wait()  # raises what went wrong
            if not self._is_sender:
                tensor.copy_(staged)

        return wait

    def close(self) -> None:
        """See `Wire`."""
        group, self._group = self._group, None
        if group is not None:
            threading.Thread(target=_end, args=(group,), name="close weights group", daemon=True).start()


def gloo_group(store: dist.Store, *, rank: int, size: int, timeout_s: float, hostname: str) -> Any:
    """Return a group of gloo's for members that are there; each of them connects to each other one."""
    create = dist.ProcessGroupGloo.create_device
    interfaces = os.environ.get(GLOO_INTERFACES)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = (
        [create(interface=name) for name in interfaces.split(",")] if interfaces else [create(hostname=hostname)]
    )
    options._timeout = timedelta(seconds=max(1.0, timeout_s / _GLOO_PATIENCE))  # to connect; messages have their own
    return dist.ProcessGroupGloo(store, rank, size, options)


def own_address(peer: str) -> str:
    """Return the address of this machine that another one sees: where the way to it begins.

    The address that this machine's name stands for is none: as Debian installs it, that is 127.0.1.1.

    Raises:
        OSError: when there is no way.
    """
    family, kind, _, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing
        address: str = probe.getsockname()[0]
        return address


def _nccl_group(store: dist.Store, *, rank: int, size: int, timeout_s: float) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    with _environment("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"):  # read here; a late message must not end the process
        return dist.ProcessGroupNCCL(store, rank, size, options)


def _own_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _broadcast_options(timeout_s: float) -> Any:
    options = dist.BroadcastOptions()
    options.rootRank = _SENDER
    options.timeout = timedelta(seconds=timeout_s)
    return options


def _end(group: Any) -> None:
    if hasattr(group, "abort"):
        group.abort()


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
