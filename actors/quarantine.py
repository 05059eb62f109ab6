"""The malformed rows that a prompt source has met: all of them counted, the first ones kept with their reasons.

    MAX_KEPT = 2, rows 7, 3, 9 and 5 are malformed and met in this order
    kept    7 | 3 7 | 3 7 | 3 5        always the first in file order of those met, whatever the order they are met in
    num     1 |  2  |  3  |  4

So what is kept is the same with and without a resume in between.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from actors.dataset import Quarantined, RawRow

MAX_KEPT = 1000
"""Rows kept with file, line and reason, so that memory and checkpoints stay small."""


class Quarantine:
    """Malformed rows of a data set with `num_rows` rows."""

    def __init__(self, num_rows: int) -> None:
        self._is_met = np.zeros(num_rows, dtype=bool)
        self._kept: dict[int, Quarantined] = {}

    @property
    def rows(self) -> list[Quarantined]:
        """The first `MAX_KEPT` of the rows met, in file order."""
        return [self._kept[ordinal] for ordinal in sorted(self._kept)]

    def __len__(self) -> int:
        """How many different rows have been met; after `restore`, of those kept and those met since."""
        return int(self._is_met.sum())

    def add(self, row: RawRow, reason: str) -> None:
        """Take a row in; one that is in already counts no second time."""
        self._is_met[row.ordinal] = True
        self._kept[row.ordinal] = Quarantined(file=row.file, line=row.line, reason=reason)
        if len(self._kept) > MAX_KEPT:
            del self._kept[max(self._kept)]

    def record(self) -> list[dict[str, Any]]:
        """Return the rows kept, JSON-able, for `restore`."""
        return [{"ordinal": ordinal, **asdict(self._kept[ordinal])} for ordinal in sorted(self._kept)]

    def restore(self, record: Sequence[dict[str, Any]]) -> None:
        """Hold exactly the rows of `record`."""
        self._kept = {
            row["ordinal"]: Quarantined(file=row["file"], line=row["line"], reason=row["reason"]) for row in record
        }
        self._is_met[:] = False
        self._is_met[list(self._kept)] = True
