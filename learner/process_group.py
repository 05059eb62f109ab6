"""The process group of the learner's ranks: joined once for each process, left when it ends."""

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist


def join_group(rank: int, world_size: int, device: torch.device) -> None:
    """Join the process group of the learner's ranks, named by MASTER_ADDR and MASTER_PORT; alone, make one.

    No rank waits longer for its peers than CONCORD_GROUP_TIMEOUT_S, where that is set.

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
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=_timeout())
    atexit.register(_leave_group)


def sends_from_cpu() -> bool:
    """Return whether members of the group can send each other what lies in host memory."""
    return dist.is_initialized() and dist.get_backend() == "gloo"


def _timeout() -> timedelta | None:
    """Return the longest wait for peers, None = torch's own."""
    seconds = os.environ.get("CONCORD_GROUP_TIMEOUT_S")
    return timedelta(seconds=float(seconds)) if seconds else None


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
