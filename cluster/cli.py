"""The command line: one YAML file and `section.field=value` overrides for each command.

Configurations are checked before anything heavy is imported, so a mistake is reported at once.
"""

from cluster.interpreter import use_rays_python

if __name__ == "__main__":
    use_rays_python("cluster.cli")  # first: in a Ray job `python` may be one that has none of what follows

import os
import sys
import time
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from cluster.cli_jobs import Address, Follow, Variables, jobs_app, submit_run
from cluster.config import ConfigError, RunConfig, load
from cluster.placement import interrupt_on_sigterm
from learner.config import RewardModelConfig, SFTConfig
from learner.offline_config import OfflineConfig

if TYPE_CHECKING:
    from rich.console import RenderableType

app = typer.Typer(
    help="Train language models from human feedback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(jobs_app, name="jobs")

_INTERRUPTED = 130

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="The configuration file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.field=value ...]", help="Settings that replace those in the file."),
]
RunDirectory = Annotated[str, typer.Argument(metavar="RUN_DIR", help="Directory of a run.")]


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a policy by reinforcement learning; continues where the run directory's last checkpoint stopped."""
    _train(_run_config(config, overrides))


@app.command()
def resume(run_dir: RunDirectory, overrides: Overrides = None) -> None:
    """Continue a run with its own configuration; only settings of where and how work is done may be replaced."""
    _must_be_run(run_dir)
    from cluster.claim import learning_changes
    from cluster.remote_storage import open_storage

    path = open_storage(run_dir).path("config.yaml")
    config = load(RunConfig, path, overrides or [])
    changes = learning_changes(load(RunConfig, path), config)
    if changes:
        raise ConfigError(
            f"a resume must keep what is learnt, and would change {', '.join(changes)}; "
            "leave these settings out, or start a new run with `concord train`"
        )
    if any(override.startswith("run.dir=") for override in overrides or []):
        raise ConfigError(f"run.dir must be the directory that is resumed, {run_dir}; leave the setting out")
    _train(_checked(config.model_copy(update={"run": config.run.model_copy(update={"dir": run_dir})})))


@app.command()
def evaluate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Answer and judge the held-out prompts with the run's newest policy, or its start where it has no checkpoint."""
    run_config = _run_config(config, overrides)
    if run_config.evaluation.prompts is None:
        raise ConfigError("evaluation.prompts must be set to evaluate; name held-out prompts")
    from cluster.session import Session

    with Session(run_config) as session:
        _, metrics = session.answer_held_out(session.step)
    for name, value in sorted(metrics.items()):
        print(f"{name:32} {value:.4f}")


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    cluster: Annotated[str, typer.Option(help="Plan for 8xH100-80GB, 2x8xH100,96cpu,1000GB, or a YAML file.")] = "",
    address: Annotated[str, typer.Option(help="Plan for the Ray cluster at this address, as it is now.")] = "",
    calibration: Annotated[str, typer.Option(help="Run directory to take step times from.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show what a training run would do, take and need, here or elsewhere; nothing is started. Status 1: it cannot."""
    run_config = _run_config(config, overrides)
    if cluster and address:
        raise ConfigError(f"one of --cluster and --address must be given, got {cluster!r} and {address!r}")
    from cluster.hardware import described, live_cluster, this_machine
    from cluster.plan import make_plan, to_json

    hardware = described(cluster) if cluster else live_cluster(address) if address else this_machine()
    planned = make_plan(run_config, hardware, calibration=calibration or None)
    if json:
        print(to_json(planned))
    else:
        from cluster.plan_page import render, verdict

        _show(render(planned))
        print(f"{verdict(planned)} Nothing was started.")
    if not planned.is_feasible:
        raise typer.Exit(1)


@app.command()
def doctor(
    config: Annotated[str, typer.Argument(metavar="[CONFIG.yaml]", help="A configuration to check as well.")] = "",
    overrides: Overrides = None,
    address: Annotated[str, typer.Option(help="A Ray cluster whose nodes must see the configuration's paths.")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Check this machine for what runs stumble over: versions, GPUs, ports, token, disks, paths. Status 1: a fail."""
    run_config = load(RunConfig, config, overrides or []) if config else None
    from cluster.doctor import examine, has_failed, render, to_json

    findings = examine(run_config, address=address or None)
    if json:
        print(to_json(findings))
    else:
        _show(render(findings))
    if has_failed(findings):
        raise typer.Exit(1)


@app.command()
def sft(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train on prompt/completion pairs or chat messages, loss on the completions."""
    sft_config = load(SFTConfig, config, overrides or [])
    from cluster.supervised import run_sft

    run_sft(sft_config)


@app.command()
def reward(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a reward model on ratings or preference pairs."""
    reward_config = load(RewardModelConfig, config, overrides or [])
    from cluster.supervised import run_reward_model

    run_reward_model(reward_config)


@app.command()
def offline(config: ConfigPath, overrides: Overrides = None) -> None:
    """Learn from preferences, ratings or the rollouts of an earlier run, without sampling: DPO, ILQL, Q-learning."""
    offline_config = load(OfflineConfig, config, overrides or [])
    from cluster.offline import run_offline

    run_offline(offline_config)


@app.command()
def report(run_dir: RunDirectory) -> None:
    """Write one self-contained report.html with curves and samples before and after."""
    _must_be_run(run_dir)
    from cluster.report import build_report

    print(build_report(run_dir))


@app.command()
def dashboard(
    output: Annotated[
        str, typer.Option(metavar="DIRECTORY", help="Where your Grafana is provisioned from; default: Ray's own.")
    ] = "",
) -> None:
    """Install the Grafana dashboard of all runs on the cluster, and say how to open it."""
    from cluster.grafana import install

    path, next_step = install(output)
    print(f"Dashboard: {path}\n{next_step}")


@app.command()
def status(
    run_dir: RunDirectory,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show how a run stands: progress, groups, faults; also while it works."""
    _must_be_run(run_dir)
    from cluster.status import run_status, status_json
    from cluster.status_page import render_status

    found = run_status(run_dir, now=time.time())
    if json:
        print(status_json(found))
    else:
        _show(render_status(found))


@app.command()
def ledger(
    run_dir: RunDirectory,
    why: Annotated[str, typer.Option(metavar="PROMPT_ID", help="A prompt or a group to explain.")] = "",
) -> None:
    """Show what became of a run's groups, or of one prompt step by step."""
    _must_be_run(run_dir)
    from cluster.status import run_status
    from cluster.status_page import render_history, render_ledger

    _show(render_history(run_dir, why) if why else render_ledger(run_status(run_dir, now=time.time())))


@app.command()
def export(
    run_dir: RunDirectory,
    output: Annotated[str, typer.Option(help="Where to write; default RUN_DIR/policy.")] = "",
) -> None:
    """Write the newest checkpoint's policy as a directory that transformers' from_pretrained loads."""
    _must_be_run(run_dir)
    from cluster.export import export_policy
    from cluster.remote_storage import open_storage

    print(export_policy(run_dir, output or open_storage(run_dir).address("policy")))


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    follow: Follow = False,
    env: Variables = None,
) -> None:
    """Train as a job on a Ray cluster: shows the plan, ships the working directory, continues the run directory."""
    run_config = load(RunConfig, config, overrides or [])
    from cluster.checks import check_run

    check_run(run_config, is_submitted=True)
    submit_run(run_config, path=config, overrides=overrides or [], address=address, follow=follow, variables=env or [])


def main() -> None:
    """Run the command line; a mistake of the user's is one message and exit status 2, a failed run status 1."""
    interrupt_on_sigterm()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # reward functions and data writers are named by import path
    try:
        status = app(standalone_mode=False)  # typer turns an interrupt into its status
    except ConfigError as error:
        _fail(f"configuration error: {error}", status=2)
    except Exception as error:
        _fail(*_describe(error))
    if status == _INTERRUPTED:
        _fail("interrupted; the run directory is readable, and the same command continues it", status=_INTERRUPTED)
    raise SystemExit(status)


def _run_config(path: str, overrides: list[str] | None) -> RunConfig:
    return _checked(load(RunConfig, path, overrides or []))


def _checked(config: RunConfig) -> RunConfig:
    from cluster.checks import check_run

    check_run(config)
    return config


def _train(config: RunConfig) -> None:
    from cluster.loop import train as train_loop
    from cluster.run import Run

    with Run(config) as run:
        train_loop(run)
    print(f"Run directory: {run.storage.shown()}\nPolicy: {run.storage.shown('policy')}")
    print(f"Report: concord report {run.storage.shown()}")


def _show(page: "RenderableType") -> None:
    from rich.console import Console

    Console(highlight=False).print(page)


def _must_be_run(directory: str) -> None:
    from cluster.object_store import is_url, without_credentials
    from cluster.remote_storage import open_storage

    if is_url(directory):
        from cluster.checks import check_store

        for problem in check_store(directory, where="RUN_DIR"):
            raise ConfigError(problem)
    if not open_storage(directory).exists("config.yaml"):
        shown = without_credentials(directory) if is_url(directory) else directory
        raise ConfigError(f"RUN_DIR must be the directory of a run, and {shown!r} holds no config.yaml")


def _describe(error: Exception) -> tuple[str, int]:
    usage = getattr(error, "format_message", None)  # typer's usage errors; it carries its own copy of click
    if usage is not None:
        return usage(), 2
    if isinstance(error, (ValueError, RuntimeError, OSError)) and not os.environ.get("CONCORD_TRACEBACK"):
        return f"{type(error).__name__}: {error}\n(CONCORD_TRACEBACK=1 shows where)", 1
    raise error


def _fail(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
