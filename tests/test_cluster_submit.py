"""`concord submit` and `concord jobs` on a real local Ray cluster that asks for its token."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from cluster.checks import check_run
from cluster.config import ConfigError
from cluster.interpreter import rays_python
from cluster.job_page import ending, last_screen, took
from cluster.storage import RunStorage
from cluster.submit import Job, environment_of
from tests.job_cluster import RAY, ROOT, job_cluster, wait_for
from tests.run_toys import TINY_POLICY, minimal_config

WALKS = "examples/randomwalks.yaml"
RULES = "def share_of_a(prompts, completions, **columns):\n    return [text.count('a') / 9 for text in completions]\n"


def job(**fields):
    base = {
        "job_id": "walks-1", "status": "FAILED", "run_dir": "/shared/walks", "entrypoint": "exec python3 ...",
        "message": "", "error_type": "JOB_ENTRYPOINT_COMMAND_ERROR", "started": 100.0, "ended": 3825.0, "exit_code": 2,
    }  # fmt: skip
    return Job(**(base | fields))


def test_time_that_a_job_has_taken():
    assert took(job(), now=9999.0) == "1:02:05"
    assert took(job(ended=None, status="RUNNING"), now=159.0) == "0:00:59"
    assert took(job(started=None, ended=None, status="PENDING"), now=159.0) == ""


def test_a_failures_cause_is_the_end_of_its_output():
    ours = "step 1\r\x1b[32mstep 2\x1b[0m\n\nValueError: run.x must be y, got z\n"
    log = f"job_manager.py:1 -- Runtime env is setting up.\nRunning entrypoint for job walks-1: exec python3 x\n{ours}"
    assert ending(job(), log, now=0.0).splitlines() == [
        "job walks-1 has failed after 1:02:05, exit status 2. Run directory: /shared/walks",
        "  step 2",
        "  ValueError: run.x must be y, got z",
        "All that it has printed: concord jobs logs walks-1",
    ]


def test_where_ray_could_not_run_the_command_the_cause_is_rays_message():
    failed = job(error_type="RUNTIME_ENV_SETUP_FAILURE", message="runtime_env setup failed: no space", exit_code=None)
    shown = ending(failed, "Runtime env is setting up.\n", now=0.0)
    assert "  runtime_env setup failed: no space\n" in shown
    assert "setting up" not in shown
    assert "no space" in ending(job(message="failed: no space"), "", now=0.0), "its node, and the log there, are gone"


@pytest.mark.parametrize("width", [1, 99, 100, 101, 1000, 99999])
def test_a_cause_fits_a_screen_and_keeps_its_end(width):
    log = "\n".join(["x" * width] * 40) + "\nError: the end"
    shown = last_screen(log)
    assert shown.endswith("Error: the end")
    assert sum(-(-len(line) // 100) for line in shown.splitlines()) <= 16
    assert shown.count("x") > 0 or width > 1500
    alone = last_screen("x" * width + "the end")
    assert alone.endswith("the end")
    assert -(-len(alone) // 100) <= 16


def test_variables_are_named_like_in_a_shell():
    assert environment_of(["A=1", "B_2=x=y", "C="]) == {"A": "1", "B_2": "x=y", "C": ""}
    for wrong in ("A", "=1", "2A=1", "A B=1"):
        with pytest.raises(ConfigError, match=r"--env must look like NAME=VALUE, got "):
            environment_of(["OK=1", wrong])


def test_paths_that_only_the_cluster_has_are_left_to_it(tmp_path):
    sections = {
        "run": {"dir": "/shared/runs/x"}, "policy": {"model": "/shared/model"}, "prompts": {"path": "/shared/p.jsonl"}
    }  # fmt: skip
    config = minimal_config(**sections)
    check_run(config, is_submitted=True)
    with pytest.raises(ConfigError, match=r"policy\.model must be .*\n?.*prompts\.path must be"):
        check_run(config)
    relative = minimal_config(**sections | {"run": {"dir": "runs/x"}, "prompts": {"path": "p.jsonl"}})
    with pytest.raises(
        ConfigError, match=r"run\.dir must be absolute in a Ray job.*'runs/x'.*\n.*prompts\.path must be"
    ):
        check_run(relative, is_submitted=True)


def test_the_python_that_ray_was_started_with_is_found_among_the_ancestors():
    """A stand-in for a raylet, whose command line has what the real one's has, starts a shell that starts a process."""
    inner = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    option = "--python_worker_command=/opt/my\\ env/bin/python3 /opt/ray/default_worker.py --x=1"
    with subprocess.Popen([sys.executable, "-c", outer, option], stdout=subprocess.PIPE, text=True) as raylet:
        pid = int(raylet.stdout.readline())
        try:
            assert rays_python(pid) == "/opt/my env/bin/python3"
            assert rays_python(os.getpid()) == "", "this process is below no raylet"
        finally:
            os.kill(pid, 9)


@pytest.fixture(scope="module")
def server():
    with job_cluster() as cluster:
        yield cluster


@pytest.fixture
def project(tmp_path):
    """A directory of a user's own, not a clone of Concord: a configuration and a reward function."""
    directory = tmp_path / "project"
    directory.mkdir()
    (directory / "own_rules.py").write_text(RULES)
    config = minimal_config(
        run={"dir": str(tmp_path / "run")},
        policy=TINY_POLICY,
        prompts={"path": str(tmp_path / "prompts.jsonl")},
        rollouts={"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 4},
        reward={"components": {"share": {"function": "own_rules:share_of_a"}}},
        learner={"backend": "local", "num_minibatches": 1},
    )
    (directory / "train.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return directory


@pytest.mark.slow
def test_a_failure_shows_its_cause_and_the_cluster_keeps_its_record(server, project):
    """The prompts are on no machine of the cluster, which only the job itself can find out."""
    failed = server.concord("submit", "train.yaml", "--address", server.address, "--follow", cwd=project)
    assert failed.returncode == 1, failed.stdout + failed.stderr
    plan, submitted, rest = failed.stdout.partition("Submitted: job ")
    assert "plan of" in plan
    assert submitted
    [job_id] = re.findall(r"^\S+", rest)
    _, failure, shown = rest.rpartition(f"job {job_id} has failed after ")
    assert failure
    assert "exit status 2" in shown
    assert "prompts.path must be an existing file or directory, got " in shown
    assert len(shown.splitlines()) <= 20
    listed = server.concord("jobs", "list", "--address", server.address)
    assert re.search(rf"{job_id}.*FAILED.*{project.parent / 'run'}", listed.stdout), listed.stdout
    logs = server.concord("jobs", "logs", job_id, RAY_ADDRESS=server.address)
    assert logs.returncode == 0
    assert "prompts.path must be an existing file" in logs.stdout


@pytest.mark.slow
def test_mistakes_are_said_before_anything_is_submitted(server, project):
    missing = server.concord("jobs", "stop", "nobody", "--address", server.address)
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "ID must be a job of this cluster, got 'nobody'" in missing.stderr
    importable = f"{ROOT}{os.pathsep}{project}"
    elsewhere = server.concord(
        "submit", str(project / "train.yaml"), "--address", server.address, PYTHONPATH=importable
    )
    assert elsewhere.returncode == 2
    assert "CONFIG.yaml must lie in the working directory" in elsewhere.stderr
    unreachable = server.concord("jobs", "list", "--address", "http://127.0.0.1:9")
    assert unreachable.returncode == 1
    assert "a Ray job server must answer at http://127.0.0.1:9, and none does" in unreachable.stderr


@pytest.mark.slow
def test_a_wrong_token_is_named_as_what_is_wrong(server):
    refused = server.concord("jobs", "list", "--address", server.address, RAY_AUTH_TOKEN="0" * 32)
    assert refused.returncode == 1
    assert "must be given the cluster's token" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_walks_train_as_a_job_and_a_finished_run_is_not_trained_again(server, tmp_path):
    arguments = ("submit", WALKS, f"run.dir={tmp_path / 'walks'}", "run.num_steps=2", "--follow")
    first = server.concord(*arguments, RAY_ADDRESS=server.address)
    assert first.returncode == 0, first.stdout + first.stderr
    assert re.search(r"^step 2/2 ", first.stdout, re.MULTILINE)
    assert "-1 has succeeded after " in first.stdout
    assert (tmp_path / "walks" / "policy" / "config.json").is_file()
    again = server.concord(*arguments, RAY_ADDRESS=server.address)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "continuing after step 2" in again.stdout
    assert "-2 has succeeded after " in again.stdout
    assert not re.search(r"^step \d", again.stdout, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_stopped_job_saves_its_step_and_goes_on_when_it_is_submitted_again(server, tmp_path):
    directory = tmp_path / "walks"
    settings = (f"run.dir={directory}", "run.num_steps=5000", "run.checkpoint_every=5000", "learner.backend=local")
    submitted = server.concord("submit", WALKS, *settings, RAY_ADDRESS=server.address)
    assert submitted.returncode == 0, submitted.stderr
    job_id = re.search(r"Submitted: job (\S+)", submitted.stdout).group(1)
    refused = server.concord("submit", WALKS, *settings, RAY_ADDRESS=server.address)
    assert refused.returncode == 2
    assert f"run.dir {directory} must have no other job at work, and {job_id} is " in refused.stderr
    wait_for(
        lambda: (
            (directory / "metrics.jsonl").is_file() and len((directory / "metrics.jsonl").read_text().split("\n")) > 3
        )
    )
    stopped = server.concord("jobs", "stop", job_id, RAY_ADDRESS=server.address)
    assert f"job {job_id} was stopped after " in stopped.stdout, stopped.stdout + stopped.stderr
    [saved] = RunStorage(str(directory)).checkpoints()
    assert saved >= 1, "a checkpoint that was not due is there"
    log = server.concord("jobs", "logs", job_id, RAY_ADDRESS=server.address).stdout
    assert f"stopped after step {saved}; the same command continues the run" in log
    again = server.concord("submit", WALKS, *settings, RAY_ADDRESS=server.address)
    second = re.search(r"Submitted: job (\S+)", again.stdout).group(1)
    assert second == f"{job_id.rpartition('-')[0]}-2"
    follower = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "jobs", "logs", second, "--follow"],
        cwd=ROOT, env=server.environment | {"RAY_ADDRESS": server.address}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines = iter(follower.stdout.readline, "")
    assert any(f"continuing after step {saved}" in line for line in lines)
    assert any(re.match(rf"step +{saved + 1}/5000 ", line) for line in lines)
    assert "was stopped" in server.concord("jobs", "stop", second, RAY_ADDRESS=server.address).stdout
    assert follower.wait(60) == 1, "who follows a job that was stopped is told so"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rays_own_command_works_whatever_python_its_shell_finds(server, tmp_path):
    command = [
        RAY, "job", "submit", "--address", server.address, "--working-dir", ".",
        "--", "python", "-m", "cluster.cli", "train", WALKS, f"run.dir={tmp_path / 'walks'}", "run.num_steps=1",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=server.environment | {"RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "walks" / "policy" / "config.json").is_file()
    listed = server.concord("jobs", "list", RAY_ADDRESS=server.address)
    assert re.search(r"raysubmit_\w+.*SUCCEEDED.*python -m cluster\.cli", listed.stdout)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_plan_is_for_the_nodes_that_are_there(server, project):
    """One comes and goes; its GPU is one of the two that are wanted, and missing ones may still come."""
    arguments = ("submit", "train.yaml", "--address", server.address, "--follow")
    gpus = ("placement.rollout_gpus=1", "placement.learner_gpus=1")
    with server.node("--num-gpus=1"):
        wanting = unwrapped(server.concord(*arguments, *gpus, cwd=project).stdout)
    assert " 4 cores. " in wanting
    assert "got 2 wanted" in wanting
    assert "Submitted all the same: a cluster that grows with its work has placement.ready_timeout_s = 300 s" in wanting
    assert "Submitted: job " in wanting
    wait_for(lambda: "with 2 CPUs. 2 cores. " in unwrapped(server.concord(*arguments, cwd=project).stdout))


def unwrapped(page):
    return " ".join(page.split())
