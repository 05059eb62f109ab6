"""Training runs as jobs on a Ray cluster, through Ray's Jobs API: what `concord submit` and `concord jobs` do.

A job is `python3 -m cluster.cli train CONFIG.yaml ...` in a copy of the working directory, on the cluster's head.
Its run directory is its identity: there is never a second job for it while one works, and the next one continues the
run, since `concord train` does.  What has happened to a job is `job_page.py`'s to show.
"""

import asyncio
import hashlib
import importlib.util
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.config import ConfigError, RunConfig
from cluster.hardware import Hardware, node_of
from cluster.object_store import is_url

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_ROOMS = ("actors", "reward", "learner", "cluster")
_RUN_DIR = "concord_run_dir"  # in a job's metadata
_STOP_WAIT_S = 600
"""Longest time that a job which was asked to stop may take to finish its step and save it; then Ray kills it."""
_POLL_S = 0.5


class SubmitError(RuntimeError):
    """The cluster's job server is out of reach, or does not do what it was asked; the message names the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as the cluster knows it.  Times are Unix times, seconds; None is what has not happened."""

    job_id: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    run_dir: str
    """Empty where it was not `concord submit` that made the job."""
    entrypoint: str
    message: str
    error_type: str
    """What of Ray has failed, where it was not the job's own command."""
    started: float | None
    ended: float | None
    exit_code: int | None

    @property
    def is_over(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.status in {"STOPPED", "SUCCEEDED", "FAILED"}


def use_token() -> None:
    """Have Ray send the cluster's token where this machine has one, as `ray start` does; RAY_AUTH_MODE, if set, wins.

    Must be called before Ray is imported.
    """
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named or os.path.isfile(os.path.expanduser("~/.ray/auth_token")):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def connect(address: str | None) -> "JobSubmissionClient":
    """Return a client of the cluster's job server.

    Args:
        address: the server's URL, or `auto` for the cluster that runs on this machine; None is what
            RAY_API_SERVER_ADDRESS or RAY_ADDRESS say, else `auto`.

    Raises:
        ConfigError: when the address is no such thing.
        SubmitError: when nobody answers there, or asks for a token that this machine does not have.
    """
    if address is not None:
        if address != "auto" and "://" not in address:
            raise ConfigError(f"--address must be a URL like http://127.0.0.1:8265, or auto, got {address!r}")
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray would let an address in the environment win
    use_token()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    _hush()
    where = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "auto"
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise SubmitError(
            f"the job server at {where} must be given the cluster's token, and refuses this machine's, or the lack of "
            "one; put the cluster's into ~/.ray/auth_token or RAY_AUTH_TOKEN, and leave RAY_AUTH_MODE at `token`"
        ) from error
    except OSError as error:  # also what `requests` raises
        reason = str(error).splitlines()[0]
        raise SubmitError(
            f"a Ray job server must answer at {where}, and none does ({reason}); start a cluster (`ray start --head`, "
            "or `ray up` and then `ray dashboard`, which forwards its port), or name another one with --address"
        ) from error


def environment_of(variables: Sequence[str]) -> dict[str, str]:
    """Return `NAME=VALUE` texts as a mapping.

    Raises:
        ConfigError: when one of them is no such text.
    """
    for text in variables:
        if not re.match(r"[A-Za-z_][A-Za-z0-9_]*=", text):
            raise ConfigError(f"--env must look like NAME=VALUE, got {text!r}")
    return dict(text.split("=", 1) for text in variables)


def hardware_of(client: "JobSubmissionClient", *, timeout_s: float = 30.0) -> Hardware:
    """Return the cluster's nodes as they are now, asked of its dashboard: this process does not join it.

    The dashboard of a cluster that has just been started takes jobs before it knows of any node, so that is waited for.

    Raises:
        SubmitError: when it knows of none in time.
    """
    from ray.util.state import list_nodes

    # Ray takes the nodes that have gone, and are filtered out, for missing ones.
    alive: Any = [("state", "=", "ALIVE")]
    address, deadline = client.get_address(), time.monotonic() + timeout_s
    found: list[Any]
    while not (found := list_nodes(address=address, filters=alive, limit=10_000, raise_on_missing_output=False)):
        if time.monotonic() > deadline:
            raise SubmitError(
                f"the cluster at {address} must have a node, and its dashboard knows of none after {timeout_s:g} s; "
                "see `ray status` there"
            )
        time.sleep(_POLL_S)
    nodes = [node_of(node.node_ip, node.resources_total, node.labels) for node in found]
    return Hardware(nodes=tuple(nodes), source=f"the Ray cluster at {address}")


def submit(
    client: "JobSubmissionClient",
    config: RunConfig,
    *,
    path: str,
    overrides: Sequence[str],
    environment: Mapping[str, str],
) -> str:
    """Have the cluster train, and return the job's id.

    Example: the second job for /shared/runs/walks is `walks-3fa2c1-2`.  Two that are submitted at the same moment have
    the same id, so that only one of them is taken.

    Args:
        client: of the cluster.
        config: what `path` and `overrides` say, checked.
        path: the configuration file, in the working directory or below it.
        overrides: `section.field=value` settings.
        environment: variables of all the job's processes.

    Raises:
        ConfigError: when a job for the run directory is still at work, or the file would not travel.
        SubmitError: when the cluster does not take the job.
    """
    relative = os.path.relpath(path)
    if relative.startswith(os.pardir):
        raise ConfigError(
            f"CONFIG.yaml must lie in the working directory, which is what the job gets, and {path} does not; change "
            "to its directory, or copy it here"
        )
    run_dir = config.run.dir.rstrip("/") if is_url(config.run.dir) else os.path.normpath(config.run.dir)
    before = [job for job in list_jobs(client) if job.run_dir == run_dir]
    working = [job for job in before if not job.is_over]
    if working:
        raise ConfigError(_taken(run_dir, working[0].job_id, working[0].status))
    job_id = f"{_stem(run_dir)}-{1 + max((_number(job.job_id) for job in before), default=0)}"
    try:
        client.submit_job(
            entrypoint=shlex.join(["exec", "python3", "-m", "cluster.cli", "train", relative, *overrides]),
            submission_id=job_id,
            runtime_env=_runtime_env(environment),
            metadata={_RUN_DIR: run_dir},
        )
    except (RuntimeError, ValueError) as error:
        if "already exists" in str(error):
            raise ConfigError(_taken(run_dir, job_id, "PENDING")) from error
        raise SubmitError(f"the cluster must take the job, and says: {_first_line(error)}") from error
    return job_id


def list_jobs(client: "JobSubmissionClient") -> list[Job]:
    """Return all jobs that were submitted to the cluster, the oldest first."""
    jobs = [_job(details) for details in client.list_jobs() if details.submission_id]
    return sorted(jobs, key=lambda job: job.started or 0.0)


def find_job(client: "JobSubmissionClient", job_id: str) -> Job:
    """Return one job.

    Raises:
        ConfigError: when the cluster has no such job.
    """
    jobs = list_jobs(client)
    for job in jobs:
        if job.job_id == job_id:
            return job
    known = ", ".join(job.job_id for job in jobs[-5:]) or "none"
    raise ConfigError(f"ID must be a job of this cluster, got {job_id!r}; the newest are: {known} (concord jobs list)")


def logs(client: "JobSubmissionClient", job_id: str) -> str:
    """Return all that a job has printed so far; "" where it has not started or its node is gone."""
    try:
        text: str = client.get_job_logs(job_id)
    except RuntimeError:
        return ""
    return text


def follow(client: "JobSubmissionClient", job_id: str, write: Callable[[str], object]) -> Job:
    """Pass on what a job prints, from its beginning, until it ends; return the ended job.

    Raises:
        SubmitError: when the connection is lost; the job goes on without it.
    """
    import aiohttp

    async def pass_on() -> None:
        async for text in client.tail_job_logs(job_id):
            write(text)

    try:
        asyncio.run(pass_on())
        return wait(client, job_id)
    except (RuntimeError, OSError, aiohttp.ClientError) as error:
        raise SubmitError(
            f"the connection to job {job_id} must hold while it is followed, and was lost ({_first_line(error)}); the "
            f"job goes on: concord jobs logs {job_id} --follow"
        ) from error


def stop(client: "JobSubmissionClient", job_id: str) -> Job:
    """Ask a job to stop, and return it when it has: its last finished step is saved before.

    Raises:
        SubmitError: when it does not stop.
    """
    client.stop_job(job_id)
    return wait(client, job_id, timeout_s=_STOP_WAIT_S + 60)


def wait(client: "JobSubmissionClient", job_id: str, *, timeout_s: float = 60.0) -> Job:
    """Return a job once it has ended.

    Raises:
        SubmitError: when it has not in time.
    """
    deadline = time.monotonic() + timeout_s
    while not (job := find_job(client, job_id)).is_over:
        if time.monotonic() > deadline:
            raise SubmitError(
                f"job {job_id} must end within {timeout_s:g} s, and is {job.status}; look at it with "
                f"concord jobs logs {job_id}"
            )
        time.sleep(_POLL_S)
    return job


def _hush() -> None:
    """Keep Ray from naming each ignore file that it reads; of what is too large to travel it still warns."""
    for name in ("_private.runtime_env.packaging", "dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    logging.getLogger("ray._private.runtime_env.working_dir").setLevel(logging.ERROR)  # warns of .git being left out


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    return Job(
        job_id=details.submission_id,
        status=str(details.status.value),
        run_dir=metadata.get(_RUN_DIR, ""),
        entrypoint=details.entrypoint,
        message=details.message or "",
        error_type=details.error_type or "",
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
    )


def _runtime_env(environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the working directory, Concord itself where that does not hold it, and the variables of all processes."""
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S), **environment}
    runtime_env: dict[str, Any] = {"working_dir": os.getcwd(), "env_vars": variables}
    if not os.path.isfile(os.path.join("cluster", "cli.py")):
        runtime_env["py_modules"] = [_package(room) for room in _ROOMS]
    return runtime_env


def _package(room: str) -> str:
    spec = importlib.util.find_spec(room)
    assert spec is not None, f"{room} must be importable where Concord runs"
    assert spec.submodule_search_locations is not None, f"{room} must be a package"
    return next(iter(spec.submodule_search_locations))


def _stem(run_dir: str) -> str:
    """Return what all jobs for a run directory are named by, like `walks-3fa2c1`."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", os.path.basename(run_dir)).strip("-.") or "run"
    return f"{name}-{hashlib.sha256(run_dir.encode()).hexdigest()[:6]}"


def _number(job_id: str) -> int:
    number = job_id.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


def _taken(run_dir: str, job_id: str, status: str) -> str:
    return (
        f"run.dir {run_dir} must have no other job at work, and {job_id} is {status}; see it with "
        f"`concord jobs logs {job_id} --follow`, end it with `concord jobs stop {job_id}`, or choose another run.dir"
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
