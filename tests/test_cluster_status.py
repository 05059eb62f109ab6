"""`concord status`, `concord ledger` and `concord resume` on run directories made by hand."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cluster import cli, status_page
from cluster.claim import claim
from cluster.config import ConfigError, RunConfig, load, to_yaml, validate
from cluster.ledger import GroupState, Ledger
from cluster.ledger_store import LedgerStore
from cluster.processes import ProcessStatus, write_processes
from cluster.status import LEDGER_FILE, MAX_SHOWN, run_status
from cluster.status_page import shown
from cluster.storage import RunStorage
from cluster.waves import NO_CONTRAST

ROOT = Path(__file__).parent.parent
HOSTILE = "[red]\x1b[2J\x1b]0;owned\x07 \u202egnp.exe"
NOW = 1000.0


def _config(directory, **sections):
    raw = {
        "run": {"dir": str(directory), "num_steps": 40, "checkpoint_every": 2},
        "policy": {"model": {"architecture": {"model_type": "gpt2"}, "tokenizer": {"characters": "abcd"}}},
        "prompts": {"path": str(directory / "prompts.jsonl")},
        "reward": {"components": {"share": {"function": "tests.rules:share_of_a"}}},
    }
    for name, section in sections.items():
        raw[name] = raw.get(name, {}) | section
    return validate(RunConfig, raw, where="test")


def _row(step, **counts):
    names = ("accepted", "trained", "dropped", "quarantined", "in_flight")
    groups = {f"groups_{name}": counts.get(name, 0) for name in names}
    faults = {"faults_num_restarts": step - 1, "faults_num_fenced": 0}
    return {"step": step, "score_mean": step / 2, "kl": float("nan"), "step_s": 3.0, **groups, **faults}


@pytest.fixture
def run_dir(tmp_path):
    """A run of 40 steps that has done 3, the checkpoint of step 2 newest, and works on step 4.

    Groups 0/a and 0/b were trained in step 1, 0/c in step 2 and 0/d in step 3; 0/e failed; 0/f and 0/g are in flight.
    """
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n')
    (tmp_path / "config.yaml").write_text(to_yaml(_config(tmp_path)))
    ledger, store, rows = Ledger(), LedgerStore(str(tmp_path / LEDGER_FILE)), []
    for step, names in ((1, ("0/a", "0/b")), (2, ("0/c",)), (3, ("0/d",))):
        for name in names:
            _judged(ledger, name, step)
        if step == 3:
            ledger.accept("0/e")
            ledger.end("0/e", GroupState.QUARANTINED, f"no answer to {HOSTILE}")
        for name in names:
            ledger.batch(name, step)
            ledger.train(name, step)
        store.append(ledger.take_transitions(), NOW - 100 + 10 * step)
        rows.append(_row(step, **ledger.counts()))
        _log(tmp_path, step, names)
        if step == 2:
            _checkpoint(tmp_path, step, ledger)
    _judged(ledger, "0/f", 4)
    store.append(ledger.take_transitions(), NOW - 9)
    ledger.accept("0/g")
    ledger.lease("0/g", "rollout-0.0", 3, 0)
    store.append(ledger.take_transitions(), NOW - 8)
    ledger.lease("0/g", "rollout-1.2", 3, 1)
    store.append(ledger.take_transitions(), NOW - 4)
    store.close()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "checkpoints" / "step-1.damaged").mkdir()
    return tmp_path


def _judged(ledger, name, step):
    ledger.accept(name)
    lease = ledger.lease(name, "rollout-0.0", step - 1, 0)
    ledger.generated(name, lease)
    ledger.scored(name, lease)


def _log(directory, step, names):
    (directory / "rollouts").mkdir(exist_ok=True)
    table = pa.table({"group_id": [name for name in names for _ in range(2)], "lease_id": [7] * 2 * len(names)})
    pq.write_table(table, directory / "rollouts" / f"step-{step}.parquet")


def _cells(text):
    lines = (line for line in text.splitlines() if line[:1] == "│")
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def _checkpoint(directory, step, ledger):
    folder = directory / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"step": step, "pipeline": {"ledger": ledger.snapshot()}}))
    (folder / "manifest.json").write_text("{}")


@pytest.fixture
def invoke(monkeypatch):
    """Run a command in this process, as the command line would; return its exit status and what it printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return run


def test_status_reads_the_history_beside_everything_else(run_dir):
    status = run_status(str(run_dir), now=NOW)
    assert (status.step, status.num_steps, status.checkpoint, status.process) == (3, 40, 2, None)
    assert (status.logged_steps, status.damaged_checkpoints) == ((1, 3), ("step-1.damaged",))
    groups = status.groups
    assert (groups.accepted, groups.trained, groups.durable) == (7, 4, 3), "step 3 is in no checkpoint yet"
    assert (groups.dropped, groups.quarantined, groups.in_flight, status.is_conserved) == (0, 1, 2, True)
    seen = [(g.group_id, g.state, g.worker, g.lease_id, g.lease_age_s, g.weights) for g in status.in_flight]
    assert seen == [
        ("0/f", "scored", "rollout-0.0", 5, 9.0, "3"),
        ("0/g", "leased", "rollout-1.2", 7, 4.0, "3 (incarnation 1)"),
    ]
    assert [(group.group_id, group.reason) for group in status.ended] == [("0/e", f"no answer to {HOSTILE}")]
    assert status.faults == {"num_restarts": 2, "num_fenced": 0}
    assert status.figures == {"score_mean": 1.5, "kl": None, "step_s": 3.0}
    assert status.notes == ()


def test_status_for_people_and_for_programs_say_the_same(run_dir, invoke):
    code, text = invoke("status", run_dir)
    assert code == 0
    assert "step 2, damaged: step-1.damaged" in text
    assert "7 accepted = 4 trained (3 in a checkpoint) + 0 dropped + 1 quarantined + 2 in flight" in text
    assert "1 scored, 1 leased" in text
    assert "yes (as ledger.sqlite counts)" in text
    assert "num_restarts 2" in text
    code, text = invoke("status", run_dir, "--json")
    found = json.loads(text)
    assert (code, found["groups"]["trained"], found["step"], found["in_flight"][1]["worker"]) == (
        0,
        4,
        3,
        "rollout-1.2",
    )
    assert text.isascii()


@pytest.mark.parametrize("damage", ["absent", "nonsense", "begun again"])
def test_without_a_history_the_other_files_serve(run_dir, invoke, damage):
    for name in os.listdir(run_dir):
        if name.startswith(LEDGER_FILE):
            (run_dir / name).unlink()
    if damage == "nonsense":
        (run_dir / LEDGER_FILE).write_bytes(b"\xa5" * 8192)
    if damage == "begun again":
        LedgerStore(str(run_dir / LEDGER_FILE)).close()
    _log(run_dir, 4, ["0/f", "0/g"])
    status = run_status(str(run_dir), now=NOW)
    groups = status.groups
    num_logged = 0 if damage == "begun again" else 2
    assert (groups.accepted, groups.trained, groups.quarantined, groups.durable) == (5 + num_logged, 4, 1, 3)
    assert (groups.in_flight, len(status.in_flight), status.is_conserved) == (num_logged, num_logged, True)
    assert len(status.notes) == 1
    assert invoke("status", run_dir)[0] == invoke("ledger", run_dir)[0] == 0


def test_a_run_that_has_not_begun_and_one_without_a_journal(run_dir, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    (empty / "config.yaml").write_text(to_yaml(_config(empty)))
    status = run_status(str(empty), now=NOW)
    assert (status.step, status.checkpoint, status.logged_steps, status.groups.accepted) == (0, None, (), 0)
    (run_dir / "metrics.jsonl").unlink()
    pq.write_table(pa.table({"step": [0, 3], "kl": [None, 0.5]}), run_dir / "metrics.parquet")
    status = run_status(str(run_dir), now=NOW)
    assert (status.step, status.figures) == (3, {"kl": 0.5})


def test_a_run_that_works_is_seen_and_not_disturbed(run_dir):
    storage = RunStorage(str(run_dir))
    lock = claim(storage, _config(run_dir))
    store = LedgerStore(str(run_dir / LEDGER_FILE))
    try:
        assert run_status(str(run_dir), now=NOW).process == str(os.getpid())
        ledger = Ledger()
        ledger.accept("0/h")
        store.append(ledger.take_transitions(), NOW)
        assert run_status(str(run_dir), now=NOW).groups.accepted == 8
    finally:
        store.close()
        lock.close()
    assert run_status(str(run_dir), now=NOW).process is None


def test_lost_and_doubled_groups_are_said(run_dir, invoke):
    """Planted bug: a group is trained a second time."""
    store = LedgerStore(str(run_dir / LEDGER_FILE))
    twice = next(event.transition for event in store.history("0/d") if event.transition.state is GroupState.TRAINED)
    store.append([twice], NOW)
    store.close()
    assert run_status(str(run_dir), now=NOW).is_conserved is False
    assert "NO (as ledger.sqlite counts)" in invoke("status", run_dir)[1]
    assert "accepted = sum of the others │ NO" in invoke("ledger", run_dir)[1]


def test_ledger_counts_and_reasons(run_dir, invoke):
    _, text = invoke("ledger", run_dir)
    rows = _cells(text)
    table = {name: value for name, value, *_ in rows}
    assert [table[name] for name in ("accepted", "trained", "dropped", "quarantined", "in flight")] == [*"74012"]
    assert table["trained and in a checkpoint"] == "3"
    assert table[f"quarantined: no answer to {shown(HOSTILE)}"] == "1"


def test_why_tells_each_transition(run_dir, invoke):
    _, text = invoke("ledger", run_dir, "--why", "d")
    assert "group 0/d" in text
    rows = _cells(text)
    assert [row[1] for row in rows] == ["accepted", "leased", "generated", "scored", "batched", "trained"]
    assert rows[0][0] == time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(NOW - 70))
    assert rows[-1][2:] == ["rollout-0.0", "4", "2", "3", "not durable yet: no checkpoint of step 3 or later"]
    assert "durable: the checkpoint of step 2 holds it" in invoke("ledger", run_dir, "--why", "0/c")[1]
    _checkpoint(run_dir, 3, Ledger())
    assert "durable: the checkpoint of step 3 holds it" in invoke("ledger", run_dir, "--why", "0/d")[1]


def test_what_a_resume_rolled_back_is_told(run_dir, invoke):
    store = LedgerStore(str(run_dir / LEDGER_FILE))
    store.rewind(2)
    store.close()
    _, text = invoke("ledger", run_dir, "--why", "d")
    assert text.count("rolled back by the resume after step 2") == 6
    assert "durable" not in text
    assert "rolled back" not in invoke("ledger", run_dir, "--why", "c")[1]


def test_a_group_that_a_resume_read_again_is_told(run_dir, invoke):
    ledger, store = Ledger(), LedgerStore(str(run_dir / LEDGER_FILE))
    ledger.accept("0/h")
    ledger.replay("0/h", 9, 4)
    store.append(ledger.take_transitions(), NOW)
    store.close()
    assert "its judged rows were read from the redo log" in invoke("ledger", run_dir, "--why", "h")[1]


def test_groups_without_a_place_are_told_after_those_that_failed(run_dir, invoke):
    ledger, store = Ledger(), LedgerStore(str(run_dir / LEDGER_FILE))
    for number in range(MAX_SHOWN + 1):
        _judged(ledger, f"2/h{number}", 4)
        ledger.leave_out(f"2/h{number}", 4, NO_CONTRAST)
    ledger.accept("2/again")
    ledger.replay("2/again", 9, 4, left_out=NO_CONTRAST)
    store.append(ledger.take_transitions(), NOW)
    store.close()
    status = run_status(str(run_dir), now=NOW)
    assert [group.group_id for group in status.ended[:3]] == ["0/e", "2/h0", "2/h1"]
    assert (status.ended[1].state, status.ended[1].step, status.ended[1].reason) == ("dropped", 4, NO_CONTRAST)
    assert (status.groups.dropped, status.is_conserved) == (MAX_SHOWN + 2, True)
    assert status.reasons[f"dropped: {NO_CONTRAST}"] == MAX_SHOWN + 2
    for name, states in (("h0", ["accepted", "leased", "generated", "scored"]), ("again", ["accepted"])):
        _, text = invoke("ledger", run_dir, "--why", name)
        rows = _cells(text)
        assert [row[1] for row in rows] == [*states, "dropped"]
        assert rows[-1][-2:] == ["4", NO_CONTRAST]


@pytest.mark.parametrize(
    ("names", "asked", "expected"),
    [
        (["0/question-17", "0/question-18"], "question-71", "got question-71; did you mean question-1"),
        (["0/question-17"], "0/question-1", "got 0/question-1; did you mean question-17?"),
        (["0/abc"], "zzz", "`concord status` names groups in flight"),
        (["0/ab\x1b[2J"], "ab\x1b[3J", r"got ab\x1b[3J; did you mean ab\x1b[2J?"),
    ],
)
def test_an_unknown_prompt_is_one_error_with_near_names(run_dir, names, asked, expected):
    ledger, store = Ledger(), LedgerStore(str(run_dir / LEDGER_FILE))
    for name in names:
        ledger.accept(name)
    store.append(ledger.take_transitions(), NOW)
    store.close()
    command = [sys.executable, "-m", "cluster.cli", "ledger", str(run_dir), "--why", asked]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 2
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert "\x1b" not in result.stderr


def _hostile_pages(run_dir, invoke):
    """Return all pages of a run with a hostile id and reason in every list."""
    ledger, store = Ledger(), LedgerStore(str(run_dir / LEDGER_FILE))
    for name in ("x", "y"):
        ledger.accept(f"0/{name}{HOSTILE}")
    ledger.end(f"0/x{HOSTILE}", GroupState.DROPPED, HOSTILE)
    store.append(ledger.take_transitions(), NOW)
    store.close()
    commands = [("status", run_dir), ("ledger", run_dir), ("ledger", run_dir, "--why", f"x{HOSTILE}")]
    return [invoke(*command)[1] for command in commands]


def test_hostile_text_stays_text(run_dir, invoke):
    for page in _hostile_pages(run_dir, invoke):
        assert not set(page) & set("\x1b\x07\u202e")
        assert r"[red]\x1b[2J\x1b]0;owned\x07 \u202egnp.exe" in page
    assert shown("tab\there, NUL \0, C1 \x9b, é, 漢") == r"tab\there, NUL \x00, C1 \x9b, é, 漢"


def test_text_that_is_not_escaped_is_caught(run_dir, invoke, monkeypatch):
    """Planted bug: rich strips some control characters by itself, and not all."""
    monkeypatch.setattr(status_page, "shown", lambda text: text)
    assert any(set(page) & set("\x1b\x07\u202e") for page in _hostile_pages(run_dir, invoke))


@pytest.mark.parametrize("command", ["status", "ledger", "resume"])
def test_what_is_no_run_is_refused(tmp_path, invoke, command):
    with pytest.raises(ConfigError, match="RUN_DIR must be the directory of a run"):
        invoke(command, tmp_path)


def test_status_loads_nothing_heavy(run_dir):
    code = (
        "import sys, cluster.cli as cli\n"
        f"sys.argv = ['concord', 'status', {str(run_dir)!r}]\n"
        "try: cli.main()\n"
        "finally: print([name for name in ('torch', 'ray', 'deepspeed', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.fixture
def trained(monkeypatch):
    """The configurations that training was started with."""
    configs = []
    monkeypatch.setattr(cli, "_train", configs.append)
    return configs


def test_resume_is_train_with_the_directory_s_own_configuration(run_dir, invoke, trained):
    assert invoke("resume", run_dir)[0] == 0
    assert trained == [load(RunConfig, str(run_dir / "config.yaml"))]
    path = run_dir / "config.yaml"
    invoke("train", path)
    assert trained[1] == trained[0]


def test_resume_in_a_directory_that_has_moved(run_dir, invoke, trained):
    (run_dir / "config.yaml").write_text(to_yaml(_config(run_dir, run={"dir": "/nowhere", "num_steps": 40})))
    invoke("resume", run_dir, "learner.num_ranks=2", "pipeline.max_restarts=9", "placement.ready_timeout_s=9")
    (config,) = trained
    assert config.run.dir == str(run_dir)
    assert (config.learner.num_ranks, config.pipeline.max_restarts, config.placement.ready_timeout_s) == (2, 9, 9.0)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["algorithm.kl.coef=0.5", "run.num_steps=50"], r"algorithm.kl.coef 0.05 -> 0.5, run.num_steps 40 -> 50;"),
        (["run.dir=/elsewhere"], "run.dir must be the directory that is resumed"),
        (["run.num_stepz=3"], "run.num_stepz is not a setting"),
        (["learner"], "an override must look like section.field=value"),
    ],
)
def test_resume_with_other_learning_is_one_clear_error(run_dir, invoke, trained, overrides, expected):
    with pytest.raises(ConfigError, match=expected):
        invoke("resume", run_dir, *overrides)
    assert trained == []


def _process(name, **facts):
    known = {"state": "up", "does": "", "waits_for": "", "weights": None, "since": None, "resident_mb": None}
    return ProcessStatus(name=name, **known | facts)


def test_each_process_of_a_run_that_works_is_told(run_dir, invoke):
    lock = claim(RunStorage(str(run_dir)), _config(run_dir))
    busy = _process("rollout-0.0", does="generates 2 groups", weights="3", since=time.time() - 90.0, resident_mb=412.3)
    idle = _process("reward-0.0", waits_for=f"rollouts {HOSTILE}")
    down = _process("rollout-1.4", state="down", waits_for="its next start, in 2.0 s")
    write_processes(str(run_dir), [busy, idle, down])
    try:
        text = invoke("status", run_dir)[1]
        found = json.loads(invoke("status", run_dir, "--json")[1])
    finally:
        lock.close()
    rows = [row for row in _cells(text) if row[1] in ("up", "down")]
    assert [row[0] for row in rows] == ["rollout-1.4", "rollout-0.0", "reward-0.0"], "who needs a look comes first"
    assert rows[0][2] == "waits for its next start, in 2.0 s"
    assert rows[1][1:4] == ["up", "generates 2 groups", "3"]
    assert 90.0 <= float(rows[1][4].removesuffix(" s")) < 150.0
    assert rows[1][5] == "412 MiB"
    assert rows[2][2] == shown(f"waits for rollouts {HOSTILE}")
    assert [process["name"] for process in found["processes"]] == ["rollout-0.0", "reward-0.0", "rollout-1.4"]


def test_processes_of_a_run_that_has_ended_are_gone(run_dir, invoke):
    write_processes(str(run_dir), [_process("rollout-0.0")])
    assert "rollout-0.0 │ up" not in invoke("status", run_dir)[1]
    assert run_status(str(run_dir), now=NOW).processes == ()
