"""The ledger's history on disks that are damaged, refuse it or cannot share a log: it never ends a run."""

import os
import random
import sqlite3

import pytest

from cluster import ledger_store
from cluster.ledger import Ledger
from cluster.ledger_history import reading
from cluster.ledger_store import LedgerStore
from tests.ledger_toys import train


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "ledger.sqlite")


def _damages():
    rng = random.Random(0)
    yield "nonsense", lambda data: b"this is no database, and it is long enough to have a header" * 99
    yield "header", lambda data: b"\0" * 100 + data[100:]
    yield "other version", None
    for number in range(12):
        start = rng.randrange(0, 40_000)
        yield f"page {number}", lambda data, start=start: data[:start] + b"\xa5" * 4096 + data[start + 4096 :]
        yield f"cut {number}", lambda data, start=start: data[: max(100, start)]


@pytest.mark.parametrize("damage", [pytest.param(change, id=name) for name, change in _damages()])
def test_damage_is_set_aside_and_said(path, damage):
    ledger, store = Ledger(), LedgerStore(path)
    for step in range(40):
        train(ledger, [f"{step}/{name}" for name in "abcd"], step)
        store.append(ledger.take_transitions(), 1.0)
    if damage is None:
        store._connection.execute("PRAGMA user_version = 99")
    store.close()
    with open(path, "rb") as file:
        data = file.read()
    if damage is not None:
        with open(path, "wb") as file:
            file.write(damage(data))
    said = []
    store = LedgerStore(path, say=said.append)
    assert len(said) == 1
    assert f"{path} is damaged (" in said[0]
    assert f"set aside as {path}.damaged;" in said[0]
    assert os.path.isfile(f"{path}.damaged")
    assert store.counts()["accepted"] == 0
    fresh = Ledger()
    train(fresh, ["0/a"], step=1)
    store.append(fresh.take_transitions(), 1.0)
    store.close()
    with reading(path) as history:
        assert history.counts() == fresh.counts()


def test_a_log_left_beside_a_damaged_file_is_not_played_into_the_new_one(path):
    ledger, store = Ledger(), LedgerStore(path)
    store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    train(ledger, ["0/a"], step=1)
    store.append(ledger.take_transitions(), 1.0)
    with open(path + "-wal", "rb") as file:
        log = file.read()
    store.close()
    with open(path, "wb") as file:
        file.write(b"\xa5" * 8192)
    with open(path + "-wal", "wb") as file:
        file.write(log)
    store = LedgerStore(path, say=lambda text: None)
    assert store.counts()["accepted"] == 0
    assert os.path.isfile(f"{path}.damaged")


def test_a_file_that_breaks_under_a_run_does_not_end_it(path):
    said = []
    ledger, store = Ledger(), LedgerStore(path, say=said.append)
    train(ledger, ["0/a"], step=1)
    store.append(ledger.take_transitions(), 1.0)
    store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store._connection.execute("PRAGMA cache_size = 0")
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * os.path.getsize(path))
    train(ledger, ["0/b"], step=2)
    store.append(ledger.take_transitions(), 2.0)
    assert (len(said), store.num_failed_writes) == (2, 1)
    assert "is damaged" in said[1]
    train(ledger, ["0/c"], step=3)
    store.append(ledger.take_transitions(), 3.0)
    assert store.counts()["trained"] == 2, "what had to wait, and what came after"
    store.rewind(2)
    assert store.counts()["trained"] == 1


class _WithoutSharedMemory(sqlite3.Connection):
    """A file system on which processes share no memory, as many networks'."""

    def execute(self, statement, *arguments):
        if statement == "PRAGMA journal_mode = WAL":
            raise sqlite3.OperationalError("locking protocol")
        return super().execute(statement, *arguments)


def test_without_a_write_ahead_log_the_history_is_kept_all_the_same(path, monkeypatch):
    said = []
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda *args, **options: connect(*args, factory=_WithoutSharedMemory, **options)
    )
    ledger, store = Ledger(), LedgerStore(path, say=said.append)
    assert len(said) == 1
    assert f"{path} is kept without a write-ahead log" in said[0]
    train(ledger, ["0/a"], step=1)
    store.append(ledger.take_transitions(), 1.0)
    store.rewind(0)
    train(ledger, ["0/b"], step=1)
    store.append(ledger.take_transitions(), 1.0)
    store.close()
    with reading(path) as history:
        assert history.counts()["trained"] == 1
    assert (store.num_failed_writes, store.num_lost) == (0, 0)
    assert not os.path.exists(f"{path}.damaged")


def test_where_no_file_can_be_made_nothing_is_kept_and_the_run_goes_on(tmp_path):
    said = []
    ledger, store = Ledger(), LedgerStore(str(tmp_path / "missing" / "ledger.sqlite"), say=said.append)
    store.rewind(0)
    for step in (1, 2):
        train(ledger, [f"0/{step}"], step)
        store.append(ledger.take_transitions(), 1.0)
    store.close()
    assert len(said) == 1
    assert "no history of the ledger is kept" in said[0]
    assert (store.num_lost, os.listdir(tmp_path)) == (12, [])


def test_another_writer_is_left_alone_and_nothing_is_set_aside(path, monkeypatch):
    store = LedgerStore(path)
    store.close()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(ledger_store, "_BUSY_TIMEOUT_S", 0.1)
    said = []
    LedgerStore(path, say=said.append).close()
    assert len(said) == 1
    assert "cannot be written (database is locked)" in said[0]
    assert not os.path.exists(f"{path}.damaged")
