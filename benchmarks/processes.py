"""The processes of a run, seen from its driver: who they are, on which core they run, how much memory they hold."""

import os
from dataclasses import dataclass

import psutil

DRIVER = "driver"
_TITLE = "ray::"
_KINDS = {"RolloutWorker": "rollout", "RewardWorker": "reward", "Rank": "learner"}
"""How the name of a process's class ends -> what the process is called here."""


def run_processes() -> dict[str, int]:
    """Return name -> process id of this process, the driver, and the run's processes among its descendants.

    Several processes of a kind are numbered by age: "rollout", "rollout-1".  Ray shows a process's class in its title.
    """
    found = {DRIVER: os.getpid()}
    for child in sorted(psutil.Process().children(recursive=True), key=lambda process: process.pid):
        try:
            title = " ".join(child.cmdline())
        except psutil.Error:  # it has just ended
            continue
        kind = kind_of(title)
        if kind is not None:
            number = sum(name.partition("-")[0] == kind for name in found)
            found[f"{kind}-{number}" if number else kind] = child.pid
    return found


def kind_of(title: str) -> str | None:
    """Return what a process is by its title, None where it is none of the run's: "ray::_Rank.step_on" -> "learner"."""
    if not title.startswith(_TITLE):
        return None
    class_name = title.removeprefix(_TITLE).partition(".")[0].strip()
    return next((kind for ending, kind in _KINDS.items() if class_name.endswith(ending)), None)


def pin(process_id: int, cores: set[int]) -> None:
    """Keep all threads of a process on some cores; a thread it starts later inherits that from its starter."""
    for thread in os.listdir(f"/proc/{process_id}/task"):
        try:
            os.sched_setaffinity(int(thread), cores)
        except ProcessLookupError:  # the thread has just ended
            continue


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a process has in main memory, MB (10^6 bytes)."""

    resident: float
    """All of it."""
    private: float
    """Without mapped files and memory shared with others: Ray's object store counts in `resident` for whoever has
    touched a page of it, and is bounded."""


def memory_of(process_id: int) -> Memory:
    """Return what a process holds now."""
    with open(f"/proc/{process_id}/statm", encoding="ascii") as file:
        resident, shared = (int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6 for pages in file.read().split()[1:3])
    return Memory(resident=resident, private=resident - shared)
