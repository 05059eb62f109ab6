"""The order of the prompts, with a memory for those that were drawn ahead.

Rounds are open for several steps at a time, so when a step is done, prompts of later steps have been drawn already.  A
resume generates those again: the position that is saved says where the order goes on, and where the prompts stand that
it owes to later steps, which are drawn first.

    prompts a b c d e f, two a step; steps 1 and 2 are open, then one of step 1 fails and e takes its place
    position after step 1      goes on at f, owes c and d
    a resume after step 1      draws c, d, f, ...
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from actors.prompts import DrawnPrompt

Place = dict[str, int]
"""Where a prompt is found by drawing one: what differs from the present position."""


class Prompts(Protocol):
    """The order itself; `actors.prompts.PromptSource` is one."""

    @property
    def position(self) -> dict[str, Any]:
        """Where the next draw continues."""

    @property
    def place(self) -> Place:
        """The part of `position` that finds the next prompt."""

    def seek(self, position: dict[str, Any]) -> None:
        """Continue there."""

    def draw(self, n: int) -> list[DrawnPrompt]:
        """Return the next prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """A prompt, and where to find it again."""

    prompt: DrawnPrompt
    place: Place


class Draws:
    """Draws prompts, those that are owed first."""

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self._owed: deque[Place] = deque()

    def draw(self, count: int) -> list[Draw]:
        """Return the next prompts."""
        drawn = self._draw_owed(min(count, len(self._owed)))
        while len(drawn) < count:
            drawn.append(self._draw_one())
        return drawn

    def position(self, owed: Iterable[Place]) -> dict[str, Any]:
        """Return plain data from which a resume draws what is owed, then goes on.

        Args:
            owed: places of the prompts that were drawn and will have to be drawn again, in order.
        """
        return {"next": self._prompts.position, "owed": [*owed, *self._owed]}

    def seek(self, position: Mapping[str, Any]) -> None:
        """Continue where a position was taken."""
        self._prompts.seek(position["next"])
        self._owed = deque(position["owed"])

    def _draw_owed(self, count: int) -> list[Draw]:
        if count == 0:
            return []
        following = self._prompts.position
        drawn = []
        for place in [self._owed.popleft() for _ in range(count)]:
            if self._prompts.place != place:
                self._prompts.seek({**following, **place})
            drawn.append(self._draw_one())
        self._prompts.seek(following)  # with its own counts: these prompts were counted when they were drawn first
        return drawn

    def _draw_one(self) -> Draw:
        place = self._prompts.place
        (prompt,) = self._prompts.draw(1)
        return Draw(prompt=prompt, place=place)
