"""Fault points: named places where a test makes the process that reaches them die, hang or fail.

They exist only where CONCORD_FAULTS is set when a process starts; elsewhere a point is one look at an empty tuple.
CONCORD_FAULTS is a comma list of `name[index]@nth=action`: at the nth time (1 by default, counted in each process) that
a process reaches the point with this index (0 by default; a learner point's is its rank), the action happens:

    kill            SIGKILL of this process
    stop            SIGSTOP of this process
    raise           RuntimeError
    enospc          OSError, no space left on device
    sleep:SECONDS   the calling thread sleeps

CONCORD_FAULTS_DIR is a directory in which an entry that fires leaves a file, made at that very moment, so that it fires
once in a whole run and not again in the process that replaces its victim.  An example: `rollout.generate@2=kill,
learner.gather[1]=enospc` kills the first rollout worker that begins a second group, and fails rank 1's first gathering.
"""

import errno
import os
import re
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass

VARIABLES = ("CONCORD_FAULTS", "CONCORD_FAULTS_DIR")
"""What a process started by another must inherit."""

_ENTRY = re.compile(
    r"(?P<name>[a-z_]+(\.[a-z_]+)*)(\[(?P<index>\d+)\])?(@(?P<nth>[1-9]\d*))?"
    r"=(?P<action>kill|stop|raise|enospc|sleep:(?P<seconds>\d+(\.\d+)?))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fault:
    name: str
    index: int
    nth: int
    action: str
    seconds: float
    marker: str  # file name, unique in the list


def fault(name: str, index: int = 0) -> None:
    """Reach the point `name`; usually nothing happens.

    Raises:
        RuntimeError: where an entry with `raise` fires.
        OSError: where an entry with `enospc` fires.
    """
    if _FAULTS:
        _reach(name, index)


def _parse(text: str) -> tuple[_Fault, ...]:
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    return tuple(_parse_entry(position, entry) for position, entry in enumerate(entries))


def _parse_entry(position: int, entry: str) -> _Fault:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise ValueError(
            f"CONCORD_FAULTS must be a comma list of name[index]@nth=kill|stop|raise|enospc|sleep:SECONDS, "
            f"got {entry!r}; correct the entry"
        )
    return _Fault(
        name=match["name"],
        index=int(match["index"] or 0),
        nth=int(match["nth"] or 1),
        action=match["action"].partition(":")[0],
        seconds=float(match["seconds"] or 0),
        marker=f"{position}-{entry}",
    )


def _reach(name: str, index: int) -> None:
    with _LOCK:  # points are reached from several threads
        _REACHED[name, index] += 1
        nth = _REACHED[name, index]
    for planned in _FAULTS:
        if (planned.name, planned.index, planned.nth) == (name, index, nth) and _is_first(planned):
            _fire(planned)


def _is_first(planned: _Fault) -> bool:
    """Return whether the entry has not fired yet in this run, and mark it as fired."""
    directory = os.environ.get("CONCORD_FAULTS_DIR")
    if not directory:
        return True
    try:
        os.close(os.open(os.path.join(directory, planned.marker), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def _fire(planned: _Fault) -> None:
    match planned.action:
        case "kill":
            signal.raise_signal(signal.SIGKILL)
        case "stop":
            signal.raise_signal(signal.SIGSTOP)  # this thread takes it, so it stops exactly here
        case "raise":
            raise RuntimeError(f"the fault point {planned.name} fired ({planned.marker})")
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), planned.name)
        case "sleep":
            time.sleep(planned.seconds)


_FAULTS = _parse(os.environ.get("CONCORD_FAULTS", ""))
_REACHED: Counter[tuple[str, int]] = Counter()
_LOCK = threading.Lock()
