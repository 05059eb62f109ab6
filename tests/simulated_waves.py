"""What dynamic sampling must come to, worked out a prompt at a time, and two ways to get it wrong."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from unittest.mock import patch

from cluster.open_round import OpenRound
from cluster.rounds import Round
from cluster.waves import Waves, has_contrast


class Kind(StrEnum):
    """What becomes of a group."""

    DIFFERENT = "#"
    """Its samples differ."""
    ALIKE = "="
    MALFORMED = "x"
    """It fails through its own fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Where the groups of one step go; each set is the whole truth of it."""

    batch: frozenset[str]
    dropped: frozenset[str]
    quarantined: frozenset[str]


def expected_step(
    groups: Iterator[str], kind_of: Callable[[str], Kind], *, num_places: int, max_waves: int | None
) -> Step:
    """Take groups off an order as one step does; `max_waves` None = each judged group has a place."""
    different: list[str] = []
    alike: list[str] = []
    malformed: list[str] = []
    places = {Kind.DIFFERENT: different, Kind.ALIKE: alike, Kind.MALFORMED: malformed}
    for _ in range(max_waves or 1):
        wanted = num_places + len(alike)
        while len(different) + len(alike) < wanted:
            group = next(groups)
            places[kind_of(group)].append(group)
        if max_waves is None or len(different) == num_places:
            break
    num_alike = num_places - len(different)
    return Step(
        batch=frozenset([*different, *alike[:num_alike]]),
        dropped=frozenset(alike[num_alike:]),
        quarantined=frozenset(malformed),
    )


@contextmanager
def judged_at_arrival() -> Iterator[None]:
    """A wave is not waited for: what has come by now and is alike loses its place, and the next wave begins."""

    def num_missing(self: OpenRound, round_: Round) -> int:
        if self.waves is not None:
            waves, finished = self.waves, round_.finished
            new = [name for name in finished if name not in waves._differs]
            waves._differs |= {name: has_contrast(finished[name][1], waves.config.component) for name in new}
            num_alike = sum(not waves._differs[name] for name in new)
            if num_alike and waves.num_begun < waves.config.max_waves:
                waves.num_begun += 1
                self.num_wanted += num_alike
        return self.num_wanted - len(round_.finished) - round_.num_open

    with patch.object(OpenRound, "num_missing", num_missing):
        yield


@contextmanager
def places_by_arrival() -> Iterator[None]:
    """Free places go back to the groups that were the first to come, not the first in the draw."""
    choose, next_wave = Waves.choose, Waves.next_wave
    arrived: dict[int, list[str]] = {}

    def noting_next_wave(self: Waves, samples: dict[str, object]) -> int:
        arrived[id(self)] = list(samples)
        return next_wave(self, samples)

    def careless_choose(self: Waves, drawn: list[str]) -> tuple[list[str], list[str]]:
        return choose(self, arrived[id(self)])

    with patch.object(Waves, "next_wave", noting_next_wave), patch.object(Waves, "choose", careless_choose):
        yield
