"""The ledger's history on disk: SQLite in the run directory, written by a run (`ledger_history.py` reads it).

    events      one row a transition, append only
    groups      each group's last event that counts

It explains a run (`concord status`, `concord ledger`) and decides nothing: a resume starts from the checkpoint's
snapshot and the redo log.  So nothing that befalls this file ends a run; it is said, and counted.

Written through a write-ahead log; on a file system that cannot share one (a network's), with SQLite's rollback journal.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from cluster.ledger import Transition
from cluster.ledger_history import IS_LIVE, NOWHERE, LedgerHistory, error_code

_SCHEMA_VERSION = 2
_SCHEMA = """
CREATE TABLE events (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, group_id TEXT NOT NULL, state TEXT NOT NULL, lease_id INTEGER,
    worker TEXT, version INTEGER, incarnation INTEGER, step INTEGER, reason TEXT, rolled_back INTEGER
);
CREATE INDEX events_of_group ON events (group_id);
CREATE TABLE groups (
    group_id TEXT PRIMARY KEY, event_id INTEGER NOT NULL, state TEXT NOT NULL,
    prompt_id TEXT GENERATED ALWAYS AS (substr(group_id, instr(group_id, '/') + 1)) VIRTUAL
) WITHOUT ROWID;
CREATE INDEX groups_of_prompt ON groups (prompt_id);
"""
_MAX_PENDING = 100_000
_BUSY_TIMEOUT_S = 5.0
"""How long another writer is waited for; a run's directory has one, so there is none."""


class LedgerStore(LedgerHistory):
    """The run's own, writing side; for one thread at a time.

    A file that is damaged is set aside as `<name>.damaged` and begun again, empty.  What cannot be written waits for
    the next append, up to a limit: `num_lost` counts the transitions beyond it.  Where no file can be opened, none is
    kept, and all are counted as lost.
    """

    def __init__(self, path: str, *, say: Callable[[str], None] = print) -> None:
        """Open or make the file.

        Args:
            path: where it lies.
            say: told, in one line, what befell the file.
        """
        self._path = path
        self._say = say
        self._pending: list[tuple[float, Transition]] = []
        self.num_failed_writes = 0
        self.num_lost = 0
        self._is_kept = True
        try:
            self._use(_open(path))
        except sqlite3.Error as error:
            try:
                self._begin_again(error)
            except (sqlite3.Error, OSError) as second:
                self._give_up(second)

    def append(self, transitions: Sequence[Transition], now: float) -> None:
        """Write transitions, all or none, and return when they are durable.

        Args:
            transitions: as `Ledger.take_transitions` returns them.
            now: Unix time, seconds.
        """
        if not self._is_kept:
            self.num_lost += len(transitions)
            return
        self._pending += [(now, transition) for transition in transitions]
        if not self._pending:
            return
        try:
            self._write()
        except sqlite3.Error as error:
            self._postpone(error)

    def rewind(self, step: int) -> None:
        """Mark everything that happened after a step as rolled back: the run resumes from that step's checkpoint.

        A group of which nothing is left is nowhere; one that was in flight at the checkpoint is accepted again when the
        ledger is restored.  Example: 0/a TRAINED in step 4, then 0/b BATCHED for step 5; rewind(4) leaves 0/a trained,
        and 0/b's events are in the history as rolled back.
        """
        try:
            self._rewind(step)
        except sqlite3.Error as error:
            self.num_failed_writes += 1
            with suppress(sqlite3.Error, OSError):  # a later append tries again
                self._begin_again(error)

    def close(self) -> None:
        """Write what waits, fold the write-ahead log into the file and close it."""
        self.append((), now=0.0)
        self._connection.close()

    def _write(self) -> None:
        rows = [_row(number, *waiting) for number, waiting in enumerate(self._pending, start=self._num_events + 1)]
        last = {group_id: (group_id, number, state) for number, _, group_id, state, *_ in rows}
        with _transaction(self._connection):
            self._connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)", rows)
            self._connection.executemany(
                "INSERT INTO groups (group_id, event_id, state) VALUES (?, ?, ?) ON CONFLICT (group_id) "
                "DO UPDATE SET event_id = excluded.event_id, state = excluded.state",
                last.values(),
            )
        self._num_events += len(rows)
        self._pending = []

    def _rewind(self, step: int) -> None:
        last_of_step = f"SELECT id FROM events WHERE step <= ? AND {IS_LIVE} ORDER BY id DESC LIMIT 1"
        last_of_group = f"SELECT MAX(id) FROM events WHERE events.group_id = groups.group_id AND {IS_LIVE}"
        with _transaction(self._connection) as connection:
            after = self._number(f"SELECT COALESCE(({last_of_step}), 0)", step)
            # Groups of later steps were on their way before this step ended; they will be accepted again.
            is_later = f"(id > ? OR step > ?) AND {IS_LIVE}"
            touched = [
                (name,)
                for (name,) in connection.execute(
                    f"SELECT DISTINCT group_id FROM events WHERE {is_later}", (after, step)
                )
            ]
            connection.execute(f"UPDATE events SET rolled_back = ? WHERE {is_later}", (step, after, step))
            connection.executemany(
                f"UPDATE groups SET event_id = COALESCE(({last_of_group}), 0) WHERE group_id = ?", touched
            )
            state = "SELECT state FROM events WHERE id = event_id"
            connection.executemany(
                f"UPDATE groups SET state = COALESCE(({state}), '{NOWHERE}') WHERE group_id = ?", touched
            )

    def _postpone(self, error: sqlite3.Error) -> None:
        if not self.num_failed_writes:
            self._say(f"the ledger's history cannot be written to {self._path} ({error}); the run goes on without")
        self.num_failed_writes += 1
        self.num_lost += max(0, len(self._pending) - _MAX_PENDING)
        self._pending = self._pending[-_MAX_PENDING:]
        if not isinstance(error, sqlite3.OperationalError):  # not a full disk: the file itself
            with suppress(sqlite3.Error, OSError):
                self._begin_again(error)

    def _begin_again(self, error: sqlite3.Error) -> None:
        if error_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise error  # another process has it
        if hasattr(self, "_connection"):
            self._connection.close()
        # The log first: a log without its file is ignored, but one beside an empty file would be played into it.
        for suffix in ("-wal", "-shm", ""):
            if os.path.exists(self._path + suffix):
                os.replace(self._path + suffix, f"{self._path}.damaged{suffix}")
        self._use(_open(self._path))
        self._say(
            f"{self._path} is damaged ({error}) and is set aside as {self._path}.damaged; the ledger's history begins "
            "again, and the run does not need it"
        )

    def _give_up(self, error: Exception) -> None:
        self._is_kept = False
        self._use(_open(":memory:"))
        self._say(
            f"no history of the ledger is kept: {self._path} cannot be written ({error}); the run goes on without"
        )

    def _use(self, connection: sqlite3.Connection) -> None:
        if connection.execute("PRAGMA journal_mode").fetchone()[0] == "delete":
            self._say(f"{self._path} is kept without a write-ahead log, which its file system cannot share")
        self._connection = connection
        self._num_events = self._number("SELECT COALESCE(MAX(id), 0) FROM events")


def _open(path: str) -> sqlite3.Connection:
    """Open a sound file, or make one."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_BUSY_TIMEOUT_S)
    try:
        _choose_journal(connection)
        connection.execute("PRAGMA synchronous = FULL")
        if not connection.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0]:
            connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;")
        _check(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _choose_journal(connection: sqlite3.Connection) -> None:
    try:
        connection.execute("PRAGMA journal_mode = WAL")  # stays what it was where the file system is known not to do
    except sqlite3.OperationalError:
        connection.execute("PRAGMA journal_mode = DELETE")


def _check(connection: sqlite3.Connection) -> None:
    found = connection.execute("PRAGMA user_version").fetchone()[0]
    if found != _SCHEMA_VERSION:
        raise sqlite3.DatabaseError(f"its version must be {_SCHEMA_VERSION}, got {found}")
    verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)
    LedgerHistory(connection).history("a name")  # all tables and columns are there


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _row(number: int, at: float, transition: Transition) -> tuple[object, ...]:
    reason = transition.reason
    return (
        number,
        at,
        transition.group_id,
        str(transition.state),
        transition.lease_id,
        transition.worker,
        transition.version,
        transition.incarnation,
        transition.step,
        reason and reason.encode(errors="backslashreplace").decode(),  # an exception's text may hold half a character
    )
