"""How much memory this process holds."""

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
