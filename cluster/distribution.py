"""Which weights rollout workers are to sample from, and which of them can come by those as they went out.

A version goes out in one of two ways: as a publication, which each worker fetches when it can, or as an offer, a
broadcast to the workers that can take part in it.  Workers that an offer passes by, and those for whom a way fails,
want the version again: `is_wanted`.
"""

from collections.abc import Callable
from typing import Any

from actors.streams import StreamOffer
from actors.wires import WireKind
from cluster.config import RunConfig
from cluster.fleet import Fleet, Member, MemberState
from cluster.messages import Weights


class WeightsWantedError(RuntimeError):
    """The newest weights went out in a way that a worker cannot take part in; publish them once more, for it alone."""


class WeightsLostError(RuntimeError):
    """No worker can fetch the newest weights any more; publish them again."""


class Distribution:
    """Of one fleet's weights.

    Example: versions 1 and 2 are publications, 3 is changes to 2.  A worker at 2 can follow to 3; one that was started
    again has nothing, so 3 is wanted in a way that begins anew.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.target: Weights | None = None
        """What every group is generated with from now on."""
        self.lost = ""
        """Why the newest publication cannot be fetched; empty while it can."""
        self.publication: Any = None
        """What workers are given to load the target; None while it is offered."""
        self._base: Weights | None = None
        self._rests = False
        self._fleet = fleet

    def publish(self, weights: Weights, publication: Any, *, base: Weights | None) -> None:
        """Let everybody load `weights` who samples from `base`, None = who samples from anything or nothing."""
        self.target, self.publication, self._base, self.lost = weights, publication, base, ""
        for member in self._fleet.members:
            member.load_failure = ""

    def offer(
        self, weights: Weights, make: Callable[[tuple[str, ...]], StreamOffer], *, base: Weights | None
    ) -> tuple[StreamOffer | None, list[Member]]:
        """Return a broadcast to those who can take part, and who they are; None where nobody can."""
        self.publish(weights, None, base=base)
        members = self._followers(weights)
        return (make(tuple(str(member.worker) for member in members)) if members else None), members

    @property
    def is_wanted(self) -> bool:
        """Whether a worker is up that the target cannot come to in the way that it went out."""
        if self.target is None:
            return False
        if self.publication is None:
            return bool(self._fleet.outdated(self.target) or self._fleet.failed_loads())
        return not all(map(self._can_follow, self._fleet.outdated(self.target)))

    def hindrance(self) -> WeightsLostError | WeightsWantedError | None:
        """Return why a worker must wait until the newest weights go out once more; None where none must."""
        if self.lost:
            return WeightsLostError(self.lost)
        return WeightsWantedError("a rollout worker has no way to the newest weights") if self.is_wanted else None

    def loaders(self) -> list[Member]:
        """Return the workers that are to fetch the publication now."""
        self._rests = False
        return self._followers(self.target) if self.target is not None and self.publication is not None else []

    def rest(self) -> None:
        """Take the weights from all workers, until there is work for them: see `resters`."""
        self._rests = True

    def resters(self) -> list[Member]:
        """Return the workers that are to forget their weights now; one that takes some on does so afterwards."""
        if not self._rests:  # asked after every answer, so it must not look at all members each time
            return []
        members = [member for member in self._fleet.members if self._can_rest(member)]
        for member in members:
            member.weights = None
        return members

    @property
    def is_resting(self) -> bool:
        """Whether workers that are to rest still take on weights."""
        return self._rests and any(member.loading is not None for member in self._fleet.members)

    def loaded(self, member: Member) -> None:
        """Note that a worker has taken on what it was loading."""
        member.weights, member.loading = member.loading, None
        member.num_sick = 0

    def failed(self, member: Member, cause: str) -> None:
        """Note that a worker could not take on what it was loading."""
        member.num_sick += 1
        if member.loading == self.target:
            member.load_failure = cause
        member.loading = None

    def take_suspects(self) -> list[Member]:
        """Return the workers that cannot load what others have; where nobody has it and nobody tries, it is `lost`.

        Once is no proof: the learner that published may have died since.  The worker waits for the next publication.
        """
        failed = self._fleet.failed_loads() if self.publication is not None else []
        members = self._fleet.members if failed else []
        if any(member.weights == self.target for member in members if member.state is MemberState.UP):
            return failed
        if failed and not any(member.loading == self.target for member in members):
            self.lost = f"{failed[0].worker}: {failed[0].load_failure}"
        return []

    def _can_rest(self, member: Member) -> bool:
        return member.state is MemberState.UP and member.loading is None and member.weights is not None

    def _followers(self, weights: Weights) -> list[Member]:
        return [member for member in self._fleet.outdated(weights) if self._can_follow(member)]

    def _can_follow(self, member: Member) -> bool:
        return self._base is None or member.weights == self._base


def wire_of(config: RunConfig) -> WireKind:
    """Return what carries a broadcast: NCCL wants a whole GPU for each member."""
    placement, wire = config.placement, config.pipeline.weights.wire
    if wire != "auto":
        return wire
    return "nccl" if placement.learner_gpus >= 1 and placement.rollout_gpus >= 1 and not placement.colocated else "gloo"
