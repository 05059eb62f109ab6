"""Weights in memory that learner and receivers share: the learner writes a version there, receivers read it there.

On a GPU that is memory of the learner's which other processes map by CUDA IPC, so that weights never leave the GPU;
on a CPU it is an anonymous file in main memory.  There is one copy of the policy, as long as the learner lives and
whoever reads: a version may be written only when nobody reads the one before, as where both take turns.
"""

import functools
import mmap
import os
import pickle
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing  # teaches ForkingPickler how tensors on a GPU are shared
from torch import Tensor

from actors.buckets import layout


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedBytes:
    """Where a bucket lies, for processes on the same machine."""

    machine: str
    memory: str | bytes
    """A path that leads to main memory, or what torch makes a tensor on a GPU of."""
    total: int  # bytes of the memory
    start: int  # first byte of the bucket
    num_bytes: int


class SharedMemoryError(RuntimeError):
    """This machine does not share memory between processes; the message says what to use instead."""


class SharedMemoryTransport:
    """Implements `actors.weights.WeightTransport`; it is given to other processes before it is used.

    Args:
        device: where the learner's memory is shared, "cpu" or "cuda" (its current one); receivers use the same one.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._written = torch.empty(0, dtype=torch.uint8)
        self._memory: str | bytes = ""

    def rooms(self, sizes: Sequence[int]) -> list[Tensor]:
        """Return a place for each bucket, the same ones each time.

        Raises:
            SharedMemoryError: when the memory can't be shared.
        """
        offsets, total = layout(sizes)
        if self._written.numel() != total:
            self._written, self._memory = (_on_gpu if self._device == "cuda" else _in_main_memory)(total)
        return [self._written[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]

    def put(self, buffer: Tensor) -> SharedBytes:
        """Return where a room is, once what is written into it is there."""
        if buffer.is_cuda:
            torch.cuda.synchronize(buffer.device)
        return SharedBytes(
            machine=_machine(),
            memory=self._memory,
            total=self._written.numel(),
            start=buffer.data_ptr() - self._written.data_ptr(),
            num_bytes=buffer.numel(),
        )

    def get(self, handle: SharedBytes) -> Tensor:
        """Return the bytes themselves; OSError or RuntimeError once the learner is gone, or from another machine."""
        if handle.machine != _machine():
            raise SharedMemoryError(
                "pipeline.weights.transport shared_memory needs rollout worker and learner on one machine, and they "
                "are on two; set object_store"
            )
        if isinstance(handle.memory, str):  # a private mapping: whoever reads can't write into the learner's memory
            whole = torch.from_file(handle.memory, shared=False, size=handle.total, dtype=torch.uint8)
        else:
            whole = pickle.loads(handle.memory)
        return whole[handle.start : handle.start + handle.num_bytes]


@functools.cache
def _machine() -> str:
    """Return what tells a machine, as long as it runs."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except FileNotFoundError:  # not Linux
        return str(uuid.getnode())


def _in_main_memory(num_bytes: int) -> tuple[Tensor, str]:
    """Return [num_bytes] uint8 and the path to them: a file without a name, which ends with those who have it open."""
    if not hasattr(os, "memfd_create"):
        raise SharedMemoryError(
            "pipeline.weights.transport shared_memory needs Linux where there is no GPU; set object_store"
        )
    number = os.memfd_create("concord-weights")
    os.ftruncate(number, max(num_bytes, mmap.PAGESIZE))
    path = f"/proc/{os.getpid()}/fd/{number}"
    memory = torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)
    weakref.finalize(memory, os.close, number)
    return memory, path


def _on_gpu(num_bytes: int) -> tuple[Tensor, bytes]:
    """Return [num_bytes] uint8 on the current GPU, in memory of their own, and what others make the tensor of."""
    torch.cuda.empty_cache()  # else they might lie in a block that would be given back later, and no longer could
    memory = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    try:
        return memory, bytes(ForkingPickler.dumps(memory))
    except RuntimeError as error:
        raise SharedMemoryError(
            f"pipeline.weights.transport shared_memory needs CUDA IPC, which fails here: {error}; set object_store"
        ) from error
