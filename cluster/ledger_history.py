"""What a run's ledger went through, read from the file that `ledger_store.py` writes and describes.

Reads at one moment of the file, also while the run writes, and disturbs nobody.
"""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from cluster.ledger import FINAL, GroupState, Transition
from cluster.storage import StorageError

_COLUMNS = "events.group_id, events.state, lease_id, worker, version, incarnation, step, reason"
IS_LIVE = "events.rolled_back IS NULL"
"""SQL: an event is not rolled back."""
_STATES = tuple(str(state) for state in GroupState)
_ENDED = f"({', '.join(repr(str(state)) for state in FINAL)})"
_IN_FLIGHT = f"({', '.join(repr(str(state)) for state in GroupState if state not in FINAL)})"
NOWHERE = "nowhere"
"""State of a group all of whose events are rolled back."""
_NUM_NEIGHBOURS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A transition in a run's history."""

    at: float
    """Unix time, seconds."""
    transition: Transition
    rolled_back: int | None
    """The step from whose checkpoint a resume started that rolled this event back; None while it counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """A group that has not ended."""

    event: Event
    """Its last one."""
    leased_at: float | None
    """When its current lease was issued, Unix time, seconds."""


class LedgerHistory:
    """What a run's ledger went through, read from an open database."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def counts(self) -> dict[str, int]:
        """Return accepted, trained, dropped, quarantined (counted from the events) and in_flight (from the groups)."""
        accepted = f"SELECT COUNT(DISTINCT group_id) FROM events WHERE state = 'accepted' AND {IS_LIVE}"
        ended = f"SELECT state, COUNT(*) FROM events WHERE state IN {_ENDED} AND {IS_LIVE} GROUP BY state"
        in_flight = f"SELECT COUNT(*) FROM groups WHERE state IN {_IN_FLIGHT}"
        found: dict[str, int] = dict(self._connection.execute(ended))
        return {
            "accepted": self._number(accepted),
            **{str(state): found.get(state, 0) for state in FINAL},
            "in_flight": self._number(in_flight),
        }

    def num_trained(self, *, up_to_step: int) -> int:
        """Return how many groups were trained in the steps up to one."""
        query = f"SELECT COUNT(*) FROM events WHERE state = 'trained' AND step <= ? AND {IS_LIVE}"
        return self._number(query, up_to_step)

    def groups_in_flight(self) -> list[InFlight]:
        """Return the groups that have not ended, in the order of their last events."""
        leased = (
            "SELECT MAX(leased.at) FROM events AS leased WHERE leased.group_id = groups.group_id "
            "AND leased.state = 'leased' AND leased.lease_id = events.lease_id AND leased.id <= events.id"
        )
        query = (
            f"SELECT ({leased}), at, NULL, {_COLUMNS} FROM groups JOIN events ON events.id = groups.event_id "
            f"WHERE groups.state IN {_IN_FLIGHT} ORDER BY events.id"
        )
        return [InFlight(leased_at=row[0], event=_event(row[1:])) for row in self._connection.execute(query)]

    def ended(self, state: GroupState, *, limit: int) -> list[Event]:
        """Return the first groups that ended in a state, in the order in which they did."""
        query = (
            f"SELECT at, NULL, {_COLUMNS} FROM groups JOIN events ON events.id = groups.event_id "
            "WHERE groups.state = ? ORDER BY events.id LIMIT ?"
        )
        return [_event(row) for row in self._connection.execute(query, (str(state), limit))]

    def reasons(self) -> list[tuple[GroupState, str, int]]:
        """Return why groups were dropped or quarantined, and how many, the most frequent reason first."""
        query = (
            f"SELECT state, reason, COUNT(*) FROM events WHERE state IN {_ENDED} AND reason IS NOT NULL AND {IS_LIVE} "
            "GROUP BY state, reason ORDER BY COUNT(*) DESC, state, reason"
        )
        return [(GroupState(state), reason, count) for state, reason, count in self._connection.execute(query)]

    def history(self, name: str) -> list[Event]:
        """Return all events, in order, of a group or of the groups of a prompt; none for a name that is neither."""
        query = f"SELECT at, rolled_back, {_COLUMNS} FROM events WHERE group_id = ? ORDER BY id"
        return [_event(row) for group in self._groups(name) for row in self._connection.execute(query, (group,))]

    def prompts_near(self, name: str) -> list[str]:
        """Return the ids of prompts that come right before or after a name in alphabetical order."""
        conditions = ("< ? ORDER BY prompt_id DESC", ">= ? ORDER BY prompt_id")
        queries = (
            f"SELECT prompt_id FROM groups WHERE prompt_id {each} LIMIT {_NUM_NEIGHBOURS}" for each in conditions
        )
        return list(dict.fromkeys(found for query in queries for (found,) in self._connection.execute(query, (name,))))

    def _groups(self, name: str) -> list[str]:
        query = "SELECT group_id FROM groups WHERE group_id = :name OR prompt_id = :name ORDER BY group_id"
        return [group for (group,) in self._connection.execute(query, {"name": name})]

    def _number(self, query: str, *values: object) -> int:
        number: int = self._connection.execute(query, values).fetchone()[0]
        return number


@contextmanager
def reading(path: str) -> Iterator[LedgerHistory]:
    """Open a run's history to read, at one moment of it, also while the run writes.

    Raises:
        StorageError: when it cannot be read.
    """
    try:
        with closing(_open_to_read(path)) as connection:
            yield LedgerHistory(connection)
    except sqlite3.Error as error:
        raise StorageError(
            f"{path} must be a readable history of a ledger, and is not ({error}); a resume does not need it, and sets "
            "it aside if it is damaged"
        ) from error


def _open_to_read(path: str) -> sqlite3.Connection:
    """Open a file, also one in a directory that nobody may write to, where only a file without a log can be read."""
    for options in ("mode=ro", "mode=ro&immutable=1"):
        connection = sqlite3.connect(f"file:{quote(os.path.abspath(path))}?{options}", uri=True, isolation_level=None)
        try:
            connection.execute("BEGIN")
            connection.execute("SELECT COUNT(*) FROM sqlite_schema")
        except sqlite3.OperationalError as error:
            connection.close()
            if error_code(error) not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
                raise
            failure = error
        else:
            return connection
    raise failure


def error_code(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code; 0 for an error that is not SQLite's own."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _event(row: Sequence[Any]) -> Event:
    """Return an event of (at, rolled_back, *_COLUMNS)."""
    at, rolled_back, group_id, state, lease_id, worker, version, incarnation, step, reason = row
    if state not in _STATES:
        raise sqlite3.DatabaseError(f"a group's state must be one of {', '.join(_STATES)}, got {state!r}")
    transition = Transition(
        group_id=group_id,
        state=GroupState(state),
        lease_id=lease_id,
        worker=worker,
        version=version,
        incarnation=incarnation,
        step=step,
        reason=reason,
    )
    return Event(at=at, transition=transition, rolled_back=rolled_back)
