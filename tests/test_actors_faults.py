import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from actors import faults

THREE_POINTS = """
from actors.faults import fault
for turn in range(3):
    print("turn", turn, flush=True)
    fault("room.point")
    fault("room.point", 1)
print("end", flush=True)
"""


def start(script, *, plan, directory=None):
    environment = {name: value for name, value in os.environ.items() if name not in faults.VARIABLES}
    environment |= {"CONCORD_FAULTS": plan} if plan else {}
    environment |= {"CONCORD_FAULTS_DIR": str(directory)} if directory else {}
    return subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=-1, stderr=-1, text=True)


def run(script, **plan):
    child = start(script, **plan)
    out, err = child.communicate(timeout=30)
    return child.returncode, out.split("\n")[:-1], err


def test_nothing_happens_where_nothing_is_planned():
    assert run(THREE_POINTS, plan=None) == (0, ["turn 0", "turn 1", "turn 2", "end"], "")


@pytest.mark.parametrize(
    ("plan", "last"),
    [
        ("room.point=kill", "turn 0"),
        ("room.point@2=kill", "turn 1"),
        ("room.point[1]@3=kill", "turn 2"),
        ("other.point=kill, room.point[1]@2=kill", "turn 1"),
    ],
)
def test_an_entry_fires_at_its_point_index_and_turn(plan, last):
    code, lines, _ = run(THREE_POINTS, plan=plan)
    assert (code, lines[-1]) == (-signal.SIGKILL, last)


@pytest.mark.parametrize("plan", ["room.point[2]=kill", "room.point@4=kill", "room.points=kill", "room=kill"])
def test_an_entry_for_another_point_does_not_fire(plan):
    assert run(THREE_POINTS, plan=plan)[:2] == (0, ["turn 0", "turn 1", "turn 2", "end"])


def test_stop_holds_the_process_until_it_is_continued():
    child = start(THREE_POINTS, plan="room.point@2=stop")
    _, status = os.waitpid(child.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    os.kill(child.pid, signal.SIGCONT)
    out, _ = child.communicate(timeout=30)
    assert (child.returncode, out.split("\n")[-2]) == (0, "end")


def test_raise_and_enospc_raise_once_each(monkeypatch):
    plan(monkeypatch, "storage.write@1=enospc,learner.step@2=raise")
    with pytest.raises(OSError, match=r"storage\.write") as caught:
        faults.fault("storage.write")
    assert caught.value.errno == errno.ENOSPC
    faults.fault("storage.write")
    faults.fault("learner.step")
    with pytest.raises(RuntimeError, match=r"learner\.step"):
        faults.fault("learner.step")
    faults.fault("learner.step")


def test_sleep_sleeps(monkeypatch):
    plan(monkeypatch, "room.point=sleep:0.2")
    started = time.monotonic()
    faults.fault("room.point")
    assert 0.2 <= time.monotonic() - started < 2


def test_an_entry_fires_once_in_a_run_and_leaves_a_file(tmp_path):
    victim = run(THREE_POINTS, plan="room.point@2=kill", directory=tmp_path)
    replacement = run(THREE_POINTS, plan="room.point@2=kill", directory=tmp_path)
    assert (victim[0], victim[1][-1]) == (-signal.SIGKILL, "turn 1")
    assert (replacement[0], replacement[1][-1]) == (0, "end")
    assert os.listdir(tmp_path) == ["0-room.point@2=kill"]


def test_an_entry_written_twice_ends_two_lives(tmp_path):
    codes = [run(THREE_POINTS, plan="room.point=kill,room.point=kill", directory=tmp_path)[0] for _ in range(3)]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]


def test_without_a_directory_it_fires_in_every_process():
    assert [run(THREE_POINTS, plan="room.point=kill")[0] for _ in range(2)] == [-signal.SIGKILL] * 2


@pytest.mark.parametrize(
    "text", ["room.point", "room.point=die", "room.point@0=kill", "room.point=sleep", "[1]=kill", "a=kill b=kill"]
)
def test_an_entry_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="CONCORD_FAULTS must be a comma list"):
        faults._parse(text)


def plan(monkeypatch, text):
    monkeypatch.setattr(faults, "_FAULTS", faults._parse(text))
    monkeypatch.setattr(faults, "_REACHED", faults.Counter())
    monkeypatch.delenv("CONCORD_FAULTS_DIR", raising=False)
