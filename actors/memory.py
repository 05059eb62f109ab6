"""How much memory this process holds, how much is left, and giving it back."""

import contextlib
import ctypes
import os
import resource
import sys


def resident_bytes() -> int:
    """Return the bytes of this process that are in main memory now; where the system does not say, the most so far."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # KiB but on macOS


def give_back() -> None:
    """Give freed memory back to the system, where torch (on a GPU) or the C library (glibc) keeps it for later."""
    import torch  # the driver, which asks how much there is, needs none

    torch.cuda.empty_cache()  # does nothing in a process that has not used a GPU
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def available_bytes() -> int:
    """Return the bytes of main memory that processes can still take without pushing anything out.

    Of the machine, or of the control group where that is less; a quarter of the machine's where the system does not
    say.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return max(0, min(available, _left_in_group()))


def _left_in_group() -> int:
    """Return what is left of the limit of this process's control group (version 2, as a container sees its own)."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = int(file.read())
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            return limit - int(file.read())
    except (OSError, ValueError):  # no such group, or its limit is the word max
        return sys.maxsize
