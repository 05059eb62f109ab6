"""GPUs, ports, Ray's token, disks of this machine.

What is looked up and what is made of it are apart: `check_...` functions take facts, so that they are tested on
invented machines.
"""

import os
import re
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.findings import Finding
from cluster.hardware import GB

RAY_PORTS = {6379: "cluster", 8265: "dashboard and jobs", 10001: "client"}
"""What `ray start --head` opens unless it is told otherwise."""

_RAY_DISK_SHARE = 0.95  # above it Ray no longer moves objects to a disk, and tasks fail
_SLOW_BYTES_PER_S = 50 * 10**6
_PROBE_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU as nvidia-smi sees it, bytes."""

    name: str
    total: int
    used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The disk behind a path."""

    about: str
    path: str
    total: int
    free: int
    bytes_per_s: float | None
    """Written and synced; None where nothing could be written."""


def look_at_gpus() -> tuple[list[Gpu], str]:
    """Return the GPUs, and the newest CUDA that their driver supports; none and "" where nvidia-smi does not answer."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        rows = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        page = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return [], ""
    found = []
    for row in rows:
        name, *sizes = (cell.strip() for cell in row.rsplit(",", 2))
        if len(sizes) == 2 and all(size.replace(".", "").isdigit() for size in sizes):
            total, used = (int(float(size)) * 2**20 for size in sizes)
            found.append(Gpu(name=name, total=total, used=used))
    version = re.search(r"CUDA Version:\s*(\d+\.\d+)", page)
    return found, version[1] if version else ""


def check_gpus(
    gpus: Sequence[Gpu], *, wanted: bool, torch: str, cuda: tuple[str, str], visible: str | None
) -> Iterator[Finding]:
    """Yield what is there and what keeps torch from using it.

    Args:
        gpus: this machine's.
        wanted: whether the configuration asks for some on this machine.
        torch: its version, with the build ("2.13.0+cpu").
        cuda: what the driver supports, and the runtime that is installed beside torch; "" = not known.
        visible: CUDA_VISIBLE_DEVICES, None where it is not set.
    """
    if not gpus:
        yield Finding(
            level="fail" if wanted else "ok",
            about="GPUs",
            found="none that nvidia-smi sees",
            remedy="set placement's GPUs to 0, or join a cluster that has some: placement.address" if wanted else "",
        )
        return
    names = ", ".join(f"{gpu.name} {gpu.total / GB:.0f} GB" for gpu in gpus)
    yield Finding(level="ok", about="GPUs", found=names)
    if torch.endswith("+cpu"):
        yield Finding(
            level="fail" if wanted else "warn",
            about="GPUs",
            found=f"torch {torch} is built for CPUs",
            remedy="install torch from PyPI, without +cpu",
        )
    driver, runtime = cuda
    if driver and runtime and int(driver.split(".")[0]) < int(runtime.split(".")[0]):
        yield Finding(
            level="fail" if wanted else "warn",
            about="GPUs",
            found=f"the driver supports CUDA {driver}, and torch brings {runtime}",
            remedy="update the driver, or install a torch that is built for the older CUDA",
        )
    if visible == "":
        yield Finding(
            level="warn", about="GPUs", found="CUDA_VISIBLE_DEVICES is empty, which hides them", remedy="unset it"
        )
    for number, gpu in enumerate(gpus):
        if gpu.used > gpu.total // 10:
            yield Finding(
                level="warn",
                about=f"GPU {number}",
                found=f"{gpu.used / GB:.1f} of {gpu.total / GB:.0f} GB are in use",
                remedy="end what uses it (nvidia-smi shows the processes)",
            )


def open_ports(ports: Sequence[int]) -> frozenset[int]:
    """Return which of these ports something listens on, on the loopback interface."""
    found = set()
    for port in ports:
        with socket.socket() as probe:
            probe.settimeout(0.5)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                found.add(port)
    return frozenset(found)


def can_bind() -> bool:
    """Return whether a process may open a port of its own."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError:
        return False
    return True


def own_address() -> str:
    """Return the address that Ray takes for this machine's where it is given none.

    That is where the way to other networks begins, and without one what this machine's name stands for.
    """
    with socket.socket(type=socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("8.8.8.8", 53))  # sends nothing
            address: str = probe.getsockname()[0]
            return address
        except OSError:
            pass
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def ray_is_running() -> bool:
    """Return whether a Ray cluster was started on this machine and lives, as Ray itself remembers it."""
    path = os.path.join(os.environ.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster")
    try:
        with open(path, encoding="utf-8") as file:
            host, _, port = file.read().strip().rpartition(":")
        with socket.create_connection((host, int(port)), timeout=1.0):
            return True
    except (OSError, ValueError):
        return False


def check_ports(
    taken: frozenset[int], *, has_ray: bool, may_bind: bool, address: str, is_cluster: bool
) -> Iterator[Finding]:
    """Yield whether Ray finds its ports, and ranks each other.

    Args:
        taken: of `RAY_PORTS`.
        has_ray: whether a Ray cluster runs here.
        may_bind: whether a process may open a port.
        address: what Ray takes for this machine's; ranks and workers of other machines look for it there.
        is_cluster: whether there are other machines.
    """
    if not may_bind:
        yield Finding(
            level="fail",
            about="ports",
            found="no port can be opened on the loopback interface",
            remedy="allow it: ranks and Ray's processes talk through ports",
        )
    if has_ray:
        yield Finding(level="ok", about="ports", found="a Ray cluster runs here")
    elif taken:
        each = ", ".join(f"{port} ({RAY_PORTS[port]})" for port in sorted(taken))
        yield Finding(
            level="warn",
            about="ports",
            found=f"{each} taken by something that is not this machine's Ray",
            remedy="a local run takes other ports; `ray start --head` needs --port, --dashboard-port, "
            "--ray-client-server-port",
        )
    else:
        yield Finding(level="ok", about="ports", found=", ".join(map(str, RAY_PORTS)) + " are free")
    if is_cluster and address.startswith("127."):
        yield Finding(
            level="warn",
            about="address",
            found=f"Ray takes {address} for this machine's",
            remedy="start it with --node-ip-address, an address that other nodes reach",
        )


def check_token(environment: Mapping[str, str], *, home: str, is_cluster: bool) -> Iterator[Finding]:
    """Yield whether Ray asks for a token, and whether others can read it."""
    if environment.get("RAY_AUTH_MODE") == "disabled":
        yield Finding(
            level="fail",
            about="token",
            found="RAY_AUTH_MODE=disabled: whoever reaches Ray's ports can run code",
            remedy="export RAY_AUTH_MODE=token, and `ray get-auth-token --generate` once",
        )
        return
    if environment.get("RAY_AUTH_TOKEN"):
        yield Finding(level="ok", about="token", found="in RAY_AUTH_TOKEN")
        return
    path = environment.get("RAY_AUTH_TOKEN_PATH") or os.path.join(home, ".ray", "auth_token")
    if not os.path.isfile(path):
        yield Finding(
            level="warn" if is_cluster else "ok",
            about="token",
            found=f"none in {path}" + ("" if is_cluster else "; a local run makes one"),
            remedy="`ray get-auth-token --generate`, and the same file on every node" if is_cluster else "",
        )
    elif os.stat(path).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield Finding(level="warn", about="token", found=f"others may read {path}", remedy=f"chmod 600 {path}")
    else:
        yield Finding(level="ok", about="token", found=f"in {path}")


def look_at_disk(about: str, path: str) -> Disk:
    """Return the disk behind a path that need not exist yet, with the speed at which it takes a file."""
    existing = os.path.abspath(path)
    while not os.path.isdir(existing):
        existing = os.path.dirname(existing)
    usage = shutil.disk_usage(existing)
    return Disk(about=about, path=existing, total=usage.total, free=usage.free, bytes_per_s=_write_speed(existing))


def check_disk(disk: Disk, *, needed: int, what: str) -> Iterator[Finding]:
    """Yield whether a disk has room, and takes data fast enough.

    Args:
        disk: what was found.
        needed: bytes that a run puts there.
        what: these are.
    """
    about, gone = f"disk: {disk.about}", disk.total - disk.free
    if disk.bytes_per_s is None:
        yield Finding(
            level="fail", about=about, found=f"{disk.path} cannot be written to", remedy="allow it or choose another"
        )
        return
    speed = f"{disk.free / GB:.0f} GB free in {disk.path}, {disk.bytes_per_s / 1e6:.0f} MB/s"
    if disk.free < needed:
        yield Finding(
            level="fail",
            about=about,
            found=f"{speed}, and {what} take {needed / GB:.1f} GB",
            remedy="free some, choose another directory, or lower run.keep_checkpoints",
        )
    elif gone > _RAY_DISK_SHARE * disk.total and disk.about == "Ray":
        yield Finding(
            level="warn",
            about=about,
            found=f"{speed}, {gone / disk.total:.0%} full",
            remedy="free some, or RAY_TMPDIR elsewhere: above 95% Ray moves no objects there, and tasks fail",
        )
    elif disk.bytes_per_s < _SLOW_BYTES_PER_S:
        yield Finding(
            level="warn", about=about, found=speed, remedy="a checkpoint would take long; choose a faster disk"
        )
    else:
        yield Finding(level="ok", about=about, found=speed)


def check_shared_memory(free: int | None, memory: int | None) -> Iterator[Finding]:
    """Yield whether /dev/shm has room for Ray's object store, 30% of the memory; None = not known."""
    if free is None or memory is None:
        return
    wanted = int(0.3 * memory)
    if free < wanted:
        yield Finding(
            level="warn",
            about="/dev/shm",
            found=f"{free / GB:.1f} GB free, and Ray's object store takes {wanted / GB:.1f} GB",
            remedy="mount it larger (docker --shm-size), or the store is on a disk; or lower --object-store-memory",
        )
    else:
        yield Finding(level="ok", about="/dev/shm", found=f"{free / GB:.0f} GB free")


def _write_speed(directory: str) -> float | None:
    """Return bytes a second of a file that is written and synced; None where it is not taken."""
    block = os.urandom(2**20)  # not zeros, which some file systems do not store
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".concord-doctor-") as file:
            started = time.perf_counter()
            for _ in range(_PROBE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return _PROBE_BYTES / (time.perf_counter() - started)
    except OSError:
        return None
