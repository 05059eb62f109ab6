"""A round as the pipeline keeps it while somebody wants it: which prompts it has, and how many more it needs."""

from concurrent.futures import Future
from dataclasses import dataclass, field

from cluster.draws import Draw
from cluster.groups import Batch
from cluster.rounds import Round
from cluster.waves import Waves


@dataclass(slots=True, kw_only=True)
class OpenRound:
    """A round somebody wants."""

    step: int
    num_wanted: int
    """Finished groups it needs, more with each wave; 0 = whatever it was given."""
    waves: Waves | None = None
    """None = each finished group has a place in the batch."""
    drawn: dict[str, Draw] = field(default_factory=dict)
    """Groups in the order of their prompts; empty for a round that was given its groups."""
    waiter: "Future[Batch] | None" = None

    def num_missing(self, round_: Round) -> int:
        """Return how many prompts to draw now: in place of groups that failed, or for another wave of groups."""
        if self.waves is not None and len(round_.finished) == self.num_wanted:
            self.num_wanted += self.waves.next_wave({name: answer[1] for name, answer in round_.finished.items()})
        return self.num_wanted - len(round_.finished) - round_.num_open
