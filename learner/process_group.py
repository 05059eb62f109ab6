"""The process group of the learner's ranks: joined once for each process, left when it ends."""

import atexit
import os
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from actors.wires import GLOO_INTERFACES, own_address


def join_group(rank: int, world_size: int, device: torch.device) -> None:
    """Join the process group of the learner's ranks, named by MASTER_ADDR and MASTER_PORT; alone, make one.

    Gloo uses the network over which this rank reaches MASTER_ADDR, unless GLOO_SOCKET_IFNAME names another.  No rank
    waits longer for its peers than CONCORD_GROUP_TIMEOUT_S, where that is set.

    Raises:
        RuntimeError: if this process already is in a group of another size, or as another rank.
    """
    for name, value in {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0}.items():
        os.environ.setdefault(name, str(value))  # DeepSpeed reads them; without them it looks for MPI
    if dist.is_initialized():
        found = (dist.get_rank(), dist.get_world_size())
        if found != (rank, world_size):
            raise RuntimeError(f"this process must be rank {rank} of {world_size}, but its group says {found}")
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        _take_the_way_to_rank_0()
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=_timeout())
    atexit.register(_leave_group)


def sends_from_cpu() -> bool:
    """Return whether members of the group can send each other what lies in host memory."""
    return dist.is_initialized() and dist.get_backend() == "gloo"


def _take_the_way_to_rank_0() -> None:
    """Name the interface for gloo, also in groups that DeepSpeed makes.

    By itself it takes the address that the machine's name stands for: 127.0.1.1, as Debian installs it.
    """
    address = own_address(os.environ["MASTER_ADDR"])
    for name, found in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in found):
            os.environ.setdefault(GLOO_INTERFACES, name)


def _timeout() -> timedelta | None:
    """Return the longest wait for peers, None = torch's own."""
    seconds = os.environ.get("CONCORD_GROUP_TIMEOUT_S")
    return timedelta(seconds=float(seconds)) if seconds else None


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
