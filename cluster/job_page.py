"""Jobs for people to read: a table of them, and how one has ended, on one screen."""

import re
import time
from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table

from cluster.submit import Job

_WIDTH = 100
_NUM_LINES = 16
"""Lines of a failure's cause, when none is wider than `_WIDTH`."""
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_OWN_COMMAND = "JOB_ENTRYPOINT_COMMAND_ERROR"
"""Ray's name for what is not Ray's fault: the job's command has exited with another status than 0."""


def render_jobs(jobs: Sequence[Job], *, now: float) -> RenderableType:
    """Return a table of jobs, the newest first.

    Args:
        jobs: the oldest first.
        now: Unix time, seconds.
    """
    if not jobs:
        return "No job was submitted to this cluster; `concord submit CONFIG.yaml` does."
    table = Table("job", "status", "submitted", "took", "run directory, or command")
    for job in reversed(jobs):
        submitted = "" if job.started is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started))
        table.add_row(job.job_id, job.status, submitted, took(job, now=now), job.run_dir or job.entrypoint)
    return table


def took(job: Job, *, now: float) -> str:
    """Return how long a job has worked, like `1:02:03`; "" where it has not begun."""
    if job.started is None:
        return ""
    seconds = int((job.ended or now) - job.started)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def ending(job: Job, log: str, *, now: float) -> str:
    """Return how a job has ended: one line, or for a failure its cause on one screen.

    The cause is the end of what the command has printed; where Ray could not run the command, it is Ray's message.

    Args:
        job: an ended one.
        log: all that it has printed.
        now: Unix time, seconds.
    """
    after = f"after {took(job, now=now)}"
    directory = f" Run directory: {job.run_dir}" if job.run_dir else ""
    if job.status == "SUCCEEDED":
        return f"job {job.job_id} has succeeded {after}.{directory}"
    if job.status == "STOPPED":
        return f"job {job.job_id} was stopped {after}; submitted again, it goes on.{directory}"
    status = "" if job.exit_code is None else f", exit status {job.exit_code}"
    own = log.partition(f"Running entrypoint for job {job.job_id}: ")[2].partition("\n")[2] or log
    reason = last_screen(own if own and job.error_type in {"", _OWN_COMMAND} else job.message)
    indented = "\n".join(f"  {line}" for line in reason.splitlines())
    return (
        f"job {job.job_id} has failed {after}{status}.{directory}\n"
        f"{indented or '  It has printed nothing.'}\n"
        f"All that it has printed: concord jobs logs {job.job_id}"
    )


def last_screen(text: str, *, num_lines: int = _NUM_LINES) -> str:
    """Return the last lines that fit on a screen, as a terminal shows them, without empty ones.

    A line that is too wide counts as the lines it fills, and of one that does not fit at all its end is kept.
    """
    kept: list[str] = []
    left = num_lines
    for line in reversed([line for line in _plain(text) if line.strip()]):
        height = -(-len(line) // _WIDTH)
        if height > left and kept:
            break
        if height > left:
            line, height = f"... {line[-(_WIDTH * left - 4) :]}", left
        kept.append(line)
        left -= height
    return "\n".join(reversed(kept))


def _plain(text: str) -> list[str]:
    """Return lines without colours, and of a line that was written over its last state."""
    return [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in _ESCAPES.sub("", text).split("\n")]
