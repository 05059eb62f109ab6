"""What really happened in a simulated world, written down where it happens and not where it is accounted for."""

from collections.abc import Callable
from dataclasses import dataclass

from actors.rollout_worker import Lease
from cluster.ledger import Transition
from cluster.messages import Call, Verb, Weights
from tests.simulated_world import Data, digest, share


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """One group inside the learner's weights."""

    step: int
    group_id: str
    content: str
    score: float
    moments: str
    """The controller's state when it planned the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Weights as they were published; they can be fetched as long as the gang lives."""

    weights: Weights
    hashed: str
    gang: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What a worker held when it generated a group."""

    group_id: str
    seed: int
    weights: str


def lineage(trained: tuple[Trained, ...]) -> str:
    """Return a hash of what weights were trained on: the same for weights that differ in their last bits only."""
    return digest(*trained)


class Truth:
    """Notes of one schedule, over all its driver processes."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.failed_once: set[str] = set()
        """Groups that have had their one failure by chance."""
        self.accusations: list[str] = []
        """What must never happen and did."""
        self.sampled: dict[str, Sampled] = {}
        """Content -> how it was made."""
        self.exported: tuple[str, tuple[Trained, ...]] | None = None
        """The final weights' hash, and what is inside them."""
        self.last_transition: dict[str, Transition] = {}
        """Of each group, as the journal was told."""
        self.living_gangs: set[int] = set()
        self.on_learning: Callable[[], None] = lambda: None
        """Called when the learner makes a step."""
        self._lineages: dict[str, str] = {}
        self._num_gangs = 0
        self._published: dict[Weights, str] = {}
        self._newest: Weights | None = None

    def next_gang(self) -> int:
        """Return the number of a new gang."""
        self._num_gangs += 1
        self.living_gangs.add(self._num_gangs)
        return self._num_gangs

    def published(self, held: Held, trained: tuple[Trained, ...]) -> None:
        """The learner hands out weights under a name, which must mean one thing for ever."""
        self._lineages[held.hashed] = lineage(trained)
        known = self._published.setdefault(held.weights, held.hashed)
        if known != held.hashed:
            self.accusations.append(f"weights {held.weights} were published twice, as {known} and {held.hashed}")
        self._newest = held.weights

    def called(self, call: Call) -> None:
        """A worker is asked: groups are generated with the newest weights only."""
        if call.verb is Verb.GENERATE:
            assert call.lease is not None, f"call {call.call_id} has a lease"
            if call.lease.weights != self._newest:
                self.accusations.append(
                    f"{call.lease.group_id} was leased with weights {call.lease.weights}, not the newest {self._newest}"
                )

    def lineage_of(self, hashed: str) -> str:
        """Return what published weights had been trained on."""
        return self._lineages[hashed]

    def generated(self, call: Call, lease: Lease, held: Held | None) -> str:
        """A worker that holds weights has generated a group; return the content."""
        assert call.lease is not None, f"call {call.call_id} has a lease"
        if held is None or held.weights != call.lease.weights:
            found = held.weights if held else "none"
            self.accusations.append(
                f"{lease.group_id} was promised weights {call.lease.weights} and sampled from {found} by {call.worker}"
            )
        hashed = held.hashed if held else ""
        content = digest("content", hashed, lease.group_id, lease.seed)
        self.sampled[content] = Sampled(group_id=lease.group_id, seed=lease.seed, weights=hashed)
        return content

    def is_known_alike(self, group_id: str) -> bool:
        """Return whether a group was ever answered with samples that are all judged alike."""
        return any(made.group_id == group_id and self.data.is_alike(content) for content, made in self.sampled.items())

    def always_fails(self, call: Call) -> bool:
        """Return whether a group fails through its own fault in this stage, whoever tries and however often."""
        assert call.lease is not None, f"call {call.call_id} has a lease"
        group_id = call.lease.group_id
        stage = Verb.GENERATE if share("stage", group_id) < 0.5 else Verb.SCORE
        return call.verb is stage and self.data.is_malformed(group_id)
