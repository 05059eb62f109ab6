"""A check that shows its teeth: it passes on the shipped part and fails on each twin with a planted bug.

A test file lists its checks and has one test:

    CHECKS = (
        Check(id="C3-rloo", run=is_unbiased, part=leave_one_out, twins={"own-score-in-baseline": minus_mean}),
    )

    @with_twins(CHECKS)
    def test_check(case: Case) -> None:
        case.verify()

Its node ids are `test_check[C3-rloo]` for the shipped part and `test_check[C3-rloo/own-score-in-baseline]` for a twin.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One fact, asserted about any implementation of a part."""

    id: str
    """Like "C3-rloo": the check's number and what it is about; no spaces, no slashes."""
    run: Callable[[Any], None]
    """Takes the part; raises AssertionError where the part is wrong."""
    part: Any
    """What is shipped: a function, or whatever `run` takes."""
    twins: Mapping[str, Any]
    """Name -> the part with one bug planted."""

    def __post_init__(self) -> None:
        if not self.twins:
            raise ValueError(f"a check must have a planted-bug twin, got none ({self.id}); what would it miss?")
        for name in (self.id, *self.twins):
            if " " in name or "/" in name:
                raise ValueError(f"a name must be free of spaces and slashes, got {name!r} ({self.id})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A check with the shipped part (`twin` None) or with one of its twins."""

    check: Check
    twin: str | None

    def verify(self) -> None:
        """Pass if the check accepts the shipped part, or refuses the twin with an AssertionError."""
        if self.twin is None:
            self.check.run(self.check.part)
            return
        try:
            self.check.run(self.check.twins[self.twin])
        except AssertionError:
            return
        pytest.fail(f"{self.check.id} must catch the planted bug {self.twin!r}, but it passed", pytrace=False)


def with_twins(checks: Sequence[Check]) -> pytest.MarkDecorator:
    """Parametrise a test over all checks and all their twins; its one argument is `case`."""
    ids = [check.id for check in checks]
    if len(set(ids)) != len(ids):
        raise ValueError(f"ids of checks must be unique, got {ids}")
    cases = [Case(check=check, twin=twin) for check in checks for twin in (None, *check.twins)]
    return pytest.mark.parametrize("case", cases, ids=[_node_id(case) for case in cases])


def _node_id(case: Case) -> str:
    return case.check.id if case.twin is None else f"{case.check.id}/{case.twin}"
