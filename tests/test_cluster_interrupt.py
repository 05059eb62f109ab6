import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from cluster import placement
from cluster.config import PlacementConfig
from cluster.interrupt import StopRequest

STEPS = """
import signal
import time
from cluster.interrupt import StopRequest

def busy(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
with StopRequest() as stop:
    try:
        print("learning", flush=True)
        busy({learn_s})
        print("learned", stop.requested, flush=True)
        with stop.interruptible():
            print("waiting", flush=True)
            busy({wait_s})
        print("waited", stop.requested, flush=True)
    except KeyboardInterrupt:
        print("interrupted", stop.requested, flush=True)
        busy({save_s})
        print("saved", flush=True)
busy({after_s})
print("end", flush=True)
"""


class Child:
    """A process with a StopRequest that says where it is."""

    def __init__(self, **seconds):
        script = STEPS.format(**{"learn_s": 0, "wait_s": 0, "save_s": 0, "after_s": 0, **seconds})
        self.process = subprocess.Popen([sys.executable, "-c", script], stdout=-1, stderr=-1, text=True)

    def until(self, line):
        while self.process.stdout.readline().strip() != line:
            assert self.process.poll() is None
        return self

    def send(self, number):
        self.process.send_signal(number)
        return self

    def end(self):
        started = time.monotonic()
        out, err = self.process.communicate(timeout=30)
        return out.split("\n")[:-1], err, self.process.returncode, time.monotonic() - started


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_outside_a_wait_the_first_request_only_sets_the_flag_and_says_so(number):
    lines, err, code, _ = Child(learn_s=0.5).until("learning").send(number).end()
    assert lines == ["learned True", "interrupted True", "saved", "end"]  # the wait is not even begun
    assert err == (f"{number.name}: stopping, with a checkpoint of the last finished step; a second one ends at once\n")
    assert code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_ends_a_wait_at_once(number):
    lines, _, code, seconds = Child(wait_s=20).until("waiting").send(number).end()
    assert lines == ["interrupted True", "saved", "end"]
    assert code == 0
    assert seconds < 5


def test_a_second_request_ends_what_the_first_lets_finish():
    child = Child(learn_s=20).until("learning").send(signal.SIGTERM)
    assert "SIGTERM" in child.process.stderr.readline()
    lines, _, _, seconds = child.send(signal.SIGINT).end()
    assert lines == ["interrupted True", "saved", "end"]
    assert seconds < 5


def test_a_second_request_ends_the_saving():
    child = Child(wait_s=20, save_s=20).until("waiting").send(signal.SIGTERM).until("interrupted True")
    lines, err, code, seconds = child.send(signal.SIGTERM).end()
    assert lines == []
    assert "KeyboardInterrupt" in err
    assert code == -signal.SIGINT
    assert seconds < 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_handlers_from_before_are_back_afterwards(number):
    child = Child(after_s=20).until("waited False")
    time.sleep(0.5)  # it says so inside the block, and leaves it then
    lines, _, code, _ = child.send(number).end()
    assert lines == []
    assert code == -number


def test_without_a_request_nothing_happens():
    lines, err, code, _ = Child().end()
    assert (lines, err, code) == (["learning", "learned False", "waiting", "waited False", "end"], "", 0)


def test_in_another_thread_nothing_is_installed():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    seen = []

    def enter():
        with StopRequest() as stop, stop.interruptible():
            seen.append([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [handlers]


class FakeRay:
    """Ray as far as joining needs it: `init` takes SIGTERM for itself."""

    def is_initialized(self):
        return False

    def init(self, **options):
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(1))

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 2.0}}]

    def get_runtime_context(self):
        return SimpleNamespace(should_capture_child_tasks_in_placement_group=False)


def test_joining_ray_leaves_sigterm_to_the_stop_request(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    said = []
    with StopRequest(said.append) as stop:
        placement.join_cluster(Config())
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
    assert len(said) == 1


def test_joining_ray_without_a_stop_request_makes_sigterm_an_interrupt(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        placement.join_cluster(Config())
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


class Config:
    """The one section that joining reads."""

    placement = PlacementConfig()
