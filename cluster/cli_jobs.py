"""`concord submit` and `concord jobs`: training runs as jobs of a Ray cluster, from its user's terminal."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from cluster.config import RunConfig

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient
    from rich.console import RenderableType

jobs_app = typer.Typer(help="List, follow and stop the training jobs of a Ray cluster.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(metavar="ID", help="A job's name, as `concord submit` and `jobs list` show it.")]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The cluster's job server, like http://127.0.0.1:8265; default RAY_API_SERVER_ADDRESS or RAY_ADDRESS, "
        "else the cluster on this machine.",
    ),
]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Show what the job prints until it ends.")]
Variables = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="An environment variable of the job's processes; may be given again."),
]


def submit_run(
    config: RunConfig,
    *,
    path: str,
    overrides: Sequence[str],
    address: str | None,
    follow: bool,
    variables: Sequence[str],
) -> None:
    """Show the plan, submit the job, and say how to go on or show what it prints.

    Args:
        config: what `path` and `overrides` say, checked.
        path: the configuration file.
        overrides: `section.field=value` settings.
        address: of the job server, see `submit.connect`.
        follow: until the job ends, and then exit as it has.
        variables: `NAME=VALUE` of the job's processes.
    """
    from cluster import submit
    from cluster.plan import make_plan
    from cluster.plan_page import render

    environment = submit.environment_of(variables)
    client = submit.connect(address)
    plan = make_plan(config, submit.hardware_of(client))
    _show(render(plan), has_markup=True)
    if not plan.is_feasible:
        _show(
            "Submitted all the same: a cluster that grows with its work has "
            f"placement.ready_timeout_s = {config.placement.ready_timeout_s:g} s for it."
        )
    job_id = submit.submit(client, config, path=path, overrides=overrides, environment=environment)
    print(f"Submitted: job {job_id} (concord jobs logs {job_id} --follow; concord jobs stop {job_id})", flush=True)
    if follow:
        _follow(client, job_id)


@jobs_app.command("list")
def list_jobs(address: Address = None) -> None:
    """Show the cluster's jobs, the newest first."""
    from cluster import submit
    from cluster.job_page import render_jobs

    _show(render_jobs(submit.list_jobs(submit.connect(address)), now=time.time()))


@jobs_app.command()
def logs(job_id: JobId, follow: Follow = False, address: Address = None) -> None:
    """Show what a job has printed; with --follow until it ends, and then exit as it has."""
    from cluster import submit

    client = submit.connect(address)
    submit.find_job(client, job_id)
    if follow:
        _follow(client, job_id)
    print(submit.logs(client, job_id), end="")


@jobs_app.command()
def stop(job_id: JobId, address: Address = None) -> None:
    """End a job; the last finished step is saved first, so that submitting it again continues."""
    from cluster import submit
    from cluster.job_page import ending

    client = submit.connect(address)
    job = submit.find_job(client, job_id)
    if not job.is_over:
        print(f"job {job_id} is asked to stop; it saves the last finished step first ...", flush=True)
        job = submit.stop(client, job_id)
    print(ending(job, submit.logs(client, job_id), now=time.time()))


def _follow(client: "JobSubmissionClient", job_id: str) -> NoReturn:
    """Show what a job prints until it ends, then how it has; exit with 0 where it has succeeded, else with 1."""
    from cluster import submit
    from cluster.job_page import ending

    with _left_alone(job_id):
        job = submit.follow(client, job_id, _write)
    print(f"\n{ending(job, submit.logs(client, job_id), now=time.time())}", flush=True)
    raise SystemExit(0 if job.status == "SUCCEEDED" else 1)


@contextmanager
def _left_alone(job_id: str) -> Iterator[None]:
    """Make Ctrl-C end the watching and not the job."""
    try:
        yield
    except KeyboardInterrupt:
        print(
            f"\njob {job_id} goes on without you: concord jobs logs {job_id} --follow, or concord jobs stop {job_id}",
            file=sys.stderr,
        )
        raise SystemExit(130) from None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _show(page: "RenderableType", *, has_markup: bool = False) -> None:
    from rich.console import Console

    Console(highlight=False, markup=has_markup, soft_wrap=isinstance(page, str)).print(page)
