"""What is said of a schedule: the final weights' own list against the ledger, and both against the data."""

from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from cluster.ledger import GroupState
from cluster.metrics import is_of_the_machine
from cluster.storage import RunStorage
from cluster.waves import NO_CONTRAST
from tests.simulated_learner import moments_after, read_shares
from tests.simulated_run import Life, accepted_order, live
from tests.simulated_truth import Trained, lineage
from tests.simulated_waves import Kind, expected_step
from tests.simulated_world import Data, digest

NUM_DATA = 24
"""Data sets; a schedule's is its seed modulo this, so that the undisturbed runs are few."""

Planted = Callable[[], AbstractContextManager[None]]
"""Puts a bug into the code that runs, for as long as it is entered."""


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What went wrong in a schedule; all lists empty = nothing."""

    seed: int
    lost: list[str] = field(default_factory=list)
    """Accepted groups that ended nowhere."""
    duplicated: list[str] = field(default_factory=list)
    """Groups in the weights more than once, or although they ended otherwise."""
    unresolved: list[str] = field(default_factory=list)
    """Why the run did not end as it may."""
    wrong: list[str] = field(default_factory=list)
    """Broken promises: weights, controller, metrics, conservation."""
    gave_up: str = ""
    """The typed error it ended with, budgets being exhausted."""
    injected: Counter[str] = field(default_factory=Counter)
    trace: int = 0
    num_starts: int = 0
    typed: Counter[str] = field(default_factory=Counter)
    num_events: int = 0
    num_past_wakeups: int = 0
    num_uninformative: int = 0
    """Groups that were dropped by dynamic sampling."""
    is_exact: bool = True

    @property
    def is_good(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.lost or self.duplicated or self.unresolved or self.wrong)

    def __str__(self) -> str:
        found = {name: getattr(self, name) for name in ("lost", "duplicated", "unresolved", "wrong")}
        return f"seed {self.seed}: " + "; ".join(f"{name} {what}" for name, what in found.items() if what)


@dataclass(frozen=True, slots=True, kw_only=True)
class Undisturbed:
    """How the run of a data set goes when nothing happens."""

    exported: tuple[str, tuple[Trained, ...]] | None
    rows: list[dict[str, Any]]
    ended_by: str


def judge(seed: int, *, planted: Planted = nullcontext, say: Callable[[str], None] | None = None) -> Verdict:
    """Live a schedule, with a planted bug or without, and say what went wrong in it."""
    data = Data.draw(seed % NUM_DATA)
    undisturbed = undisturbed_run(data)
    with planted():
        verdict: Verdict = live(seed, data, say=say, examine=lambda life: _verdict(seed, life, undisturbed))
    return verdict


@cache
def undisturbed_run(data: Data) -> Undisturbed:
    """Return how a data set's run goes without faults."""

    def examine(life: Life) -> Undisturbed:
        assert not life.untyped, f"the undisturbed run fails: {life.untyped}"
        assert not life.typed, "the undisturbed run gives up"
        return Undisturbed(
            exported=life.place.truth.exported, rows=_timeless(life.rows), ended_by=life.ended_by.split(":")[0]
        )

    undisturbed: Undisturbed = live(None, data, examine=examine)
    return undisturbed


def _verdict(seed: int, life: Life, undisturbed: Undisturbed) -> Verdict:
    world, truth = life.place.world, life.place.truth
    verdict = Verdict(
        seed=seed,
        injected=world.injected,
        trace=world.trace,
        num_starts=life.num_starts,
        typed=life.typed,
        num_events=world.num_events,
        num_past_wakeups=world.num_past_wakeups,
        is_exact=world.is_exact and truth.data.max_staleness == 0,
        num_uninformative=sum(last.reason == NO_CONTRAST for last in truth.last_transition.values()),
        wrong=list(truth.accusations),
    )
    if world.num_past_wakeups:
        verdict.wrong.append(f"the pipeline wanted to be woken in the past {world.num_past_wakeups} times")
    if life.untyped:
        verdict.unresolved.append(life.untyped)
    elif life.is_complete:
        _judge_complete(verdict, life, undisturbed)
    elif life.ended_by:
        verdict.gave_up = life.ended_by
        is_repeatable = truth.data.max_staleness == 0
        if (
            is_repeatable
            and life.ended_by.split(":")[0] != undisturbed.ended_by
            and not world.injected["loss_not_finite_by_chance"]
        ):
            verdict.unresolved.append(life.ended_by)
    elif life.typed:
        verdict.gave_up = "typed errors"
    else:
        verdict.unresolved.append("no end")
    _judge_checkpoint(verdict, life)
    return verdict


def _judge_complete(verdict: Verdict, life: Life, undisturbed: Undisturbed) -> None:
    world, truth = life.place.world, life.place.truth
    assert truth.exported is not None, "the run is complete"
    hashed, trained = truth.exported
    _judge_groups(verdict, life, trained)
    _judge_weights(verdict, life, trained)
    if verdict.is_exact:
        _judge_composition(verdict, life)
    if truth.data.max_staleness == 0 and undisturbed.ended_by and not world.injected["loss_not_finite_by_chance"]:
        verdict.unresolved.append(f"the undisturbed run ends with {undisturbed.ended_by}")
    elif verdict.is_exact:
        if (hashed, trained) != undisturbed.exported:
            verdict.wrong.append(f"final weights {hashed} differ from the undisturbed run's")
        if _timeless(life.rows) != undisturbed.rows:
            verdict.wrong.append(
                f"metrics differ from the undisturbed run's: {_difference(life.rows, undisturbed.rows)}"
            )


def _judge_groups(verdict: Verdict, life: Life, trained: tuple[Trained, ...]) -> None:
    """Each accepted group must be in one place, and the weights are asked which."""
    truth, counts = life.place.truth, life.counts
    inside = Counter(group.group_id for group in trained)
    step_of = {group.group_id: group.step for group in trained}
    accepted = accepted_order(truth.data, life.position, owed=life.owed)
    skipped = {row["step"] for row in life.rows if row.get("skipped")}
    ends: Counter[str] = Counter()
    for group_id in accepted:
        last = truth.last_transition.get(group_id)
        state = last.state if last is not None else None
        ends[str(state)] += 1
        is_dropped = state is GroupState.DROPPED and last is not None and last.step in skipped
        if state is GroupState.DROPPED and last is not None and last.reason == NO_CONTRAST:
            is_dropped = truth.is_known_alike(group_id)
        is_quarantined = state is GroupState.QUARANTINED and truth.data.is_malformed(group_id)
        is_trained = state is GroupState.TRAINED and last is not None and step_of.get(group_id) == last.step
        if inside[group_id] > 1 or (inside[group_id] and not is_trained):
            verdict.duplicated.append(f"{group_id} ({inside[group_id]} times in the weights, {state})")
        elif not inside[group_id] and not is_dropped and not is_quarantined:
            verdict.lost.append(f"{group_id} (not in the weights, {state})")
    verdict.duplicated += [f"{group_id} (never accepted)" for group_id in inside if group_id not in set(accepted)]
    if life.told != counts:
        verdict.wrong.append(f"the ledger counts {counts}, and its history {life.told}")
    said = {name: counts[name] for name in ("trained", "dropped", "quarantined")}
    if said != {name: ends[name] for name in said} or counts["accepted"] != len(accepted) or counts["in_flight"]:
        verdict.wrong.append(f"the ledger counts {counts}, and of {len(accepted)} accepted groups there are {ends}")


def _judge_composition(verdict: Verdict, life: Life) -> None:
    """Each step's batch, and what was dropped for it, are those that the data's order and the answers ask for."""
    truth, data = life.place.truth, life.place.truth.data
    batches: dict[int, set[str]] = defaultdict(set)
    dropped: dict[int, set[str]] = defaultdict(set)
    for group_id, last in truth.last_transition.items():
        if last.step is not None and last.state is not GroupState.QUARANTINED:
            (dropped if last.reason == NO_CONTRAST else batches)[last.step].add(group_id)

    def kind_of(group_id: str) -> Kind:
        if data.is_malformed(group_id):
            return Kind.MALFORMED
        return Kind.ALIKE if truth.is_known_alike(group_id) else Kind.DIFFERENT

    order = iter(accepted_order(data, data.num_steps * data.groups_per_step * 20))
    for step in range(1, data.num_steps + 1):
        due = expected_step(order, kind_of, num_places=data.groups_per_step, max_waves=data.max_waves)
        if (batches[step], dropped[step]) != (due.batch, due.dropped):
            found = f"{sorted(batches[step])}, dropped {sorted(dropped[step])}"
            verdict.wrong.append(f"the batch of step {step} is {found}, and should be {due}")


def _judge_weights(verdict: Verdict, life: Life, trained: tuple[Trained, ...]) -> None:
    """Every sample is from the weights before its step, by the run's seed, and the controller has seen each batch."""
    truth, config = life.place.truth, life.place.config
    planned, observed = digest("moments"), digest("coefficient")
    # A step that was learnt and is skipped by the next driver, or the reverse, leaves later rows on disk as they are.
    is_lenient = bool(life.place.world.injected["loss_not_finite_by_chance"])
    for step in sorted({group.step for group in trained}):
        before = _lineages_before(step, trained, truth.data.max_staleness)
        batch = [group for group in trained if group.step == step]
        for group in batch:
            made = truth.sampled[group.content]
            if (made.group_id, made.seed) != (group.group_id, config.run.seed):
                verdict.wrong.append(
                    f"{group.group_id} was trained with the answer of {made.group_id}, seed {made.seed}"
                )
            if truth.lineage_of(made.weights) not in before and not is_lenient:
                verdict.wrong.append(f"{group.group_id} of step {step} was not sampled from weights shortly before it")
        samples = digest(*sorted(f"{group.group_id}={group.score}" for group in batch for _ in range(2)))
        planned = moments_after(planned, samples)
        if {group.moments for group in batch} != {digest(planned, observed)}:
            verdict.wrong.append(f"the controller had not seen exactly the steps before step {step}")
        observed = moments_after(observed, samples)


def _lineages_before(step: int, trained: tuple[Trained, ...], max_staleness: int) -> set[str]:
    """Return what the weights may have been trained on that a step's groups are sampled from."""
    first = max(1, step - max_staleness)
    return {lineage(tuple(group for group in trained if group.step < end)) for end in range(first, step + 1)}


def _judge_checkpoint(verdict: Verdict, life: Life) -> None:
    """The newest checkpoint is whole, and what is in it is one state."""
    newest = RunStorage(life.place.disk.directory).newest_checkpoint()
    if newest is None:
        if life.is_complete:
            verdict.wrong.append("there is no checkpoint at the end")
        return
    step, directory = newest
    shares = read_shares(directory)
    if shares[0] != shares[1] or any(group["step"] > step for group in shares[0]["trained"]):
        verdict.wrong.append(f"the checkpoint of step {step} holds another state")
    if life.is_complete and step != life.place.config.run.num_steps:
        verdict.wrong.append(f"the newest checkpoint at the end is of step {step}")


def _timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out times and fault counters."""
    return [{name: row[name] for name in row if not is_of_the_machine(name)} for row in rows]


def _difference(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> str:
    ours = _timeless(rows)
    if [row["step"] for row in ours] != [row["step"] for row in expected]:
        return f"steps {[row['step'] for row in ours]}"
    pairs = zip(ours, expected, strict=True)
    return str(
        [
            (row["step"], name, row.get(name), other.get(name))
            for row, other in pairs
            for name in sorted({*row, *other})
            if row.get(name) != other.get(name)
        ][:3]
    )
