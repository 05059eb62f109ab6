"""The ledger's history on disk: what it holds, also after a resume and a kill."""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import ledger_store
from cluster.ledger import GroupState, Ledger
from cluster.ledger_history import reading
from cluster.ledger_store import LedgerStore
from cluster.storage import StorageError
from tests.ledger_toys import begin, train


def _states(events):
    return [str(event.transition.state) for event in events]


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "ledger.sqlite")


def test_history_holds_every_transition_with_its_time(path):
    ledger, store = Ledger(), LedgerStore(path)
    ledger.accept("0/a")
    ledger.lease("0/a", "rollout-0.0", 3, 0)
    store.append(ledger.take_transitions(), 100.0)
    lease = ledger.lease("0/a", "rollout-1.2", 3, 1)
    ledger.generated("0/a", lease)
    transitions = ledger.take_transitions()
    store.append(transitions, 107.5)
    store.close()
    with reading(path) as history:
        events = history.history("0/a")
        assert [event.at for event in events] == [100.0, 100.0, 107.5, 107.5]
        assert [event.transition for event in events[2:]] == transitions
        assert {event.rolled_back for event in events} == {None}
        (group,) = history.groups_in_flight()
    assert (group.event, group.leased_at) == (events[-1], 107.5), "the lease's age is that of its second issue"


def test_prompts_are_found_in_all_epochs_and_by_any_id(path):
    ledger, store = Ledger(), LedgerStore(path)
    for name in ("0/a/b", "1/a/b", "0/a", "0/' OR 1=1 --"):
        ledger.accept(name)
    store.append(ledger.take_transitions(), 1.0)
    assert [event.transition.group_id for event in store.history("a/b")] == ["0/a/b", "1/a/b"]
    assert [event.transition.group_id for event in store.history("1/a/b")] == ["1/a/b"]
    assert len(store.history("' OR 1=1 --")) == 1
    assert store.history("b") == []
    assert store.prompts_near("a/c") == ["a/b", "a", "' OR 1=1 --"], "the nearest first, each once"


def test_counts_and_reasons(path):
    ledger, store = Ledger(), LedgerStore(path)
    train(ledger, ["0/a", "0/b"], step=1)
    begin(ledger, ["0/c", "0/d", "0/e", "0/f"])
    ledger.end("0/d", GroupState.QUARANTINED, "half a character: \ud800")
    ledger.end("0/e", GroupState.DROPPED, "non_finite")
    ledger.end("0/f", GroupState.DROPPED, "non_finite")
    store.append(ledger.take_transitions(), 1.0)
    assert store.counts() == ledger.counts()
    assert (store.num_trained(up_to_step=0), store.num_trained(up_to_step=1)) == (0, 2)
    assert store.reasons() == [
        (GroupState.DROPPED, "non_finite", 2), (GroupState.QUARANTINED, "half a character: \\ud800", 1)
    ]  # fmt: skip
    assert [event.transition.group_id for event in store.ended(GroupState.DROPPED, limit=1)] == ["0/e"]


def test_a_group_trained_twice_or_lost_shows_in_the_counts(path):
    """Planted bugs: accepted is no longer the sum of the others."""
    ledger, store = Ledger(), LedgerStore(path)
    train(ledger, ["0/a"], step=1)
    transitions = ledger.take_transitions()
    store.append([*transitions, transitions[-1]], 1.0)
    assert store.counts() == {"accepted": 1, "trained": 2, "dropped": 0, "quarantined": 0, "in_flight": 0}
    store._connection.execute("DELETE FROM groups")
    begin(ledger, ["0/b"])
    store.append(ledger.take_transitions()[:1], 1.0)
    store._connection.execute("DELETE FROM groups WHERE group_id = '0/b'")
    assert store.counts()["accepted"] == 2
    assert store.counts()["in_flight"] == 0


def _two_steps_and_a_half(store):
    ledger = Ledger()
    train(ledger, ["0/a"], step=1)
    store.append(ledger.take_transitions(), 1.0)
    snapshot = ledger.snapshot()
    train(ledger, ["0/b"], step=2)
    begin(ledger, ["0/c"])
    store.append(ledger.take_transitions(), 2.0)
    return snapshot


def test_a_resume_rolls_back_what_came_after_its_checkpoint(path):
    store = LedgerStore(path)
    snapshot = _two_steps_and_a_half(store)
    store.rewind(1)
    assert store.counts() == {"accepted": 1, "trained": 1, "dropped": 0, "quarantined": 0, "in_flight": 0}
    assert [event.rolled_back for event in store.history("0/a")] == [None] * 6
    assert [event.rolled_back for event in store.history("b")] == [1] * 6, "kept, and marked"
    ledger = Ledger()
    ledger.restore(snapshot)
    train(ledger, ["0/b"], step=2)
    store.append(ledger.take_transitions(), 3.0)
    assert store.counts() == ledger.counts()
    assert [event.rolled_back for event in store.history("0/b")] == [1] * 6 + [None] * 6
    store.close()
    store = LedgerStore(path)
    store.rewind(0)
    assert store.counts()["accepted"] == 0
    assert [event.rolled_back for event in store.history("0/b")] == [1] * 6 + [0] * 6, "each by the first resume"


def test_groups_in_flight_at_the_checkpoint_are_accepted_again(path):
    ledger, store = Ledger(), LedgerStore(path)
    begin(ledger, ["0/c"])
    train(ledger, ["0/a"], step=1)
    snapshot = ledger.snapshot()
    ledger.batch("0/c", 2)
    ledger.train("0/c", 2)
    store.append(ledger.take_transitions(), 1.0)
    store.rewind(1)
    ledger.restore(snapshot)
    store.append(ledger.take_transitions(), 2.0)
    assert store.counts() == ledger.counts() == {
        "accepted": 2, "trained": 1, "dropped": 0, "quarantined": 0, "in_flight": 1
    }  # fmt: skip
    assert _states(store.history("0/c")) == [
        "accepted", "leased", "generated", "scored", "batched", "trained", "accepted"
    ]  # fmt: skip


def test_a_rewind_that_forgets_the_groups_is_caught(path, monkeypatch):
    """Planted bug: events are marked, and the groups keep their states."""
    monkeypatch.setattr(ledger_store, "NOWHERE", "accepted")
    store = LedgerStore(path)
    _two_steps_and_a_half(store)
    store.rewind(1)
    counts = store.counts()
    assert counts["accepted"] != sum(counts.values()) - counts["accepted"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=14), st.randoms(use_true_random=False))
def test_resumes_anywhere_agree_with_the_ledger(actions, rng):
    """0-3 train a step, with some groups dropped; above, the run is killed and resumes from any of its checkpoints."""
    with tempfile.TemporaryDirectory() as directory:
        _train_and_resume(LedgerStore(os.path.join(directory, "ledger.sqlite")), actions, rng)


def _train_and_resume(store, actions, rng):
    ledger, step, drawn = Ledger(), 0, 0
    snapshots = {0: (ledger.snapshot(), 0)}
    for action in actions:
        if action < 4:
            step += 1
            names = [f"0/p{number}" for number in range(drawn, drawn + 3)]
            drawn += 3
            begin(ledger, names)
            ledger.end(names.pop(), GroupState.QUARANTINED, "why") if action == 1 else None
            for name in names:
                ledger.batch(name, step)
            for name in names:
                ledger.end(name, GroupState.DROPPED, "non_finite") if action == 2 else ledger.train(name, step)
            snapshots[step] = (ledger.snapshot(), drawn)
        else:
            begin(ledger, [f"0/p{drawn}"])
            store.append(ledger.take_transitions(), float(step))
            step = rng.choice([known for known in snapshots if known <= step])
            snapshot, drawn = snapshots[step]
            store.rewind(step)
            ledger = Ledger()
            ledger.restore(snapshot)
        store.append(ledger.take_transitions(), float(step))
        assert store.counts() == ledger.counts()
        trained = [n for n in range(drawn) if any(_is_trained(event) for event in store.history(f"0/p{n}"))]
        assert len(trained) == ledger.counts()["trained"]
    store.close()


def _is_trained(event):
    return event.rolled_back is None and event.transition.state is GroupState.TRAINED


_CHILD = """
import sys, time
from cluster.ledger import Ledger
from cluster.ledger_store import LedgerStore

store, ledger = LedgerStore(sys.argv[1]), Ledger()
for step in range(1, 100_000):
    for group in (f"{step}/a", f"{step}/b"):
        ledger.accept(group)
        lease = ledger.lease(group, "rollout-0.0", step, 0)
        ledger.generated(group, lease)
        ledger.scored(group, lease)
        ledger.batch(group, step)
        ledger.train(group, step)
    store.append(ledger.take_transitions(), time.time())
    print(step, flush=True)
"""


def test_a_killed_run_leaves_whole_transactions_and_readers_never_disturb_it(path):
    process = subprocess.Popen([sys.executable, "-c", _CHILD, path], stdout=subprocess.PIPE, text=True)
    seen = []
    while len(seen) < 25:
        acknowledged = int(process.stdout.readline())
        with reading(path) as history:
            counts = history.counts()
            assert history.counts() == counts, "one moment of the file, while the run goes on"
        assert counts["accepted"] == counts["trained"] >= 2 * acknowledged
        seen.append(counts["trained"])
    process.send_signal(signal.SIGKILL)
    acknowledged += len(process.stdout.readlines())
    process.wait()
    assert seen == sorted(seen)
    with reading(path) as history:
        counts = history.counts()
    assert counts["trained"] in (2 * acknowledged, 2 * acknowledged + 2), "all that was acknowledged, and whole steps"
    said = []
    store = LedgerStore(path, say=said.append)
    assert (store.counts(), said) == (counts, [])
    assert {len(store.history(f"{step}/{name}")) for step in range(1, acknowledged + 1) for name in "ab"} == {6}


def test_a_write_that_fails_halfway_leaves_nothing_and_is_made_up_for(path):
    said = []
    ledger, store = Ledger(), LedgerStore(path, say=said.append)
    train(ledger, ["0/a"], step=1)
    store._connection.execute("PRAGMA max_page_count = 12")  # a full disk
    for number in range(200):
        ledger.accept(f"1/{number:04d}{'x' * 50}")
    store.append(ledger.take_transitions(), 1.0)
    train(ledger, ["0/b"], step=2)
    store.append(ledger.take_transitions(), 2.0)
    assert store.counts()["accepted"] == 0, "a transaction is whole or absent"
    assert (store.num_failed_writes, len(said)) == (2, 1)
    assert "full" in said[0]
    store._connection.execute("PRAGMA max_page_count = 100000")
    store.append((), 3.0)
    assert store.counts() == ledger.counts()
    assert store.num_lost == 0
    assert [event.at for event in store.history("0/b")] == [2.0] * 6


def test_what_waits_for_the_disk_is_bounded_and_counted(path, monkeypatch):
    monkeypatch.setattr(ledger_store, "_MAX_PENDING", 10)
    ledger, store = Ledger(), LedgerStore(path, say=lambda text: None)
    store._connection.execute("PRAGMA query_only = 1")
    for start in range(0, 30, 6):
        train(ledger, [f"0/{start}"], step=1)
        store.append(ledger.take_transitions(), 1.0)
    assert (len(store._pending), store.num_lost, store.num_failed_writes) == (10, 20, 5)


def test_reading_what_is_no_history_is_one_clear_error(path, tmp_path):
    with pytest.raises(StorageError, match="must be a readable history"), reading(path):
        pass
    (tmp_path / "ledger.sqlite").write_bytes(b"\xa5" * 8192)
    with pytest.raises(StorageError, match=r"must be a readable history of a ledger, and is not"), reading(path):
        pass


def test_a_reader_writes_nothing(path):
    ledger, store = Ledger(), LedgerStore(path)
    train(ledger, ["0/a"], step=1)
    store.append(ledger.take_transitions(), 1.0)
    with pytest.raises(StorageError, match="readonly"), reading(path) as history:
        history._connection.execute("DELETE FROM events")
    assert store.counts()["trained"] == 1


@contextmanager
def _guest(directory):
    """Let this process do only what somebody may who may not write to a directory."""
    os.chmod(directory, 0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        os.chmod(directory, 0o755)


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_history_that_nobody_may_write_to_is_read(is_closed):
    with tempfile.TemporaryDirectory() as directory:  # not pytest's, which is closed to others
        path = os.path.join(directory, "ledger.sqlite")
        ledger, store = Ledger(), LedgerStore(path)
        train(ledger, ["0/a"], step=1)
        store.append(ledger.take_transitions(), 1.0)
        if is_closed:
            store.close()
        with _guest(directory), reading(path) as history:
            assert history.counts() == ledger.counts()
