"""The learner of a simulated world: its weights are the list of what it was trained on, in order, and a hash of it.

A group's entry says what the group's rows held, so the list is the truth about what is inside the weights, whatever the
ledger says.  The ranks are one state here, for they hold the same weights or are started again.
"""

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from actors.weights import Bucket, Publication
from cluster.deliveries import fetched
from cluster.messages import Weights
from cluster.ranks import GangError
from learner.learner import Skipped
from tests.simulated_disk import SimulatedDisk
from tests.simulated_tables import score_of
from tests.simulated_truth import Held, Trained, Truth
from tests.simulated_world import World, digest

NUM_SHARES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the controller hands to the ranks."""

    step: int
    moments: str
    """The controller's state: a hash of every batch it has seen, in order."""


class SimulatedController:
    """Remembers the batches it has planned and observed, as running moments would."""

    def __init__(self) -> None:
        self._planned = digest("moments")
        self._observed = digest("coefficient")

    def plan(self, step: int, samples: pa.Table) -> Plan:
        """Take a batch into the moments."""
        self._planned = moments_after(self._planned, samples_digest(samples))
        return Plan(step=step, moments=digest(self._planned, self._observed))

    def observe(self, plan: Plan, samples: pa.Table, learner_metrics: Mapping[str, float]) -> None:
        """Let the coefficient see a batch."""
        self._observed = moments_after(self._observed, samples_digest(samples))

    def metrics(self, plan: Plan, samples: pa.Table) -> dict[str, float]:
        """Return figures that hang on the batch and on the controller's state."""
        return {"score_mean": _as_float(samples_digest(samples)), "kl_coef": _as_float(self._observed)}

    def evaluation_metrics(self, samples: pa.Table) -> dict[str, float]:
        """Return figures of held-out samples."""
        return {"score_mean": _as_float(samples_digest(samples)), "moments": _as_float(self._planned)}

    def state_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"planned": self._planned, "observed": self._observed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from plain data."""
        self._planned, self._observed = state["planned"], state["observed"]


def moments_after(moments: str, samples: str) -> str:
    """Return running moments that have seen one more batch."""
    return digest(moments, samples)


def samples_digest(samples: pa.Table) -> str:
    """Return a hash of what a batch's SAMPLES say."""
    pairs = zip(samples["group_id"].to_pylist(), samples["components"].to_pylist(), strict=True)
    return digest(*sorted(f"{group_id}={dict(components)['share']}" for group_id, components in pairs))


def _as_float(hashed: str) -> float:
    return int(hashed[:12], 16) / 16.0**12


class SimulatedGang:
    """A `LearnerGang` whose ranks die, hang and cannot write."""

    def __init__(self, world: World, truth: Truth, disk: SimulatedDisk, *, timeout_s: float) -> None:
        self._world = world
        self._truth = truth
        self._disk = disk
        self._timeout_s = timeout_s
        self._number = truth.next_gang()
        self._noise = "" if world.is_exact else f"gang {self._number}"
        self._trained: tuple[Trained, ...] = ()
        self._hash = first_hash(truth.data.seed)
        self._writing: dict[str, Any] | None = None
        world.tell("gang starts")

    def wait_ready(self) -> None:
        """Wait for the model."""
        self._work("starting", 2.0, deadly="rank_death_in_start")

    def check(self) -> None:
        """Make sure that every rank lives."""
        self._work("checking", 0.05)

    def step(self, plan: Plan, tables: Sequence[pa.Table]) -> dict[str, float] | Skipped:
        """Train on a batch; the ranks may die before it is applied, or after."""
        self._truth.on_learning()
        self._work(f"step {plan.step}", 3.0, deadly="rank_death_before_step", hanging="rank_hang")
        before, answer = self._hash, None
        by_chance = not self._world.is_exact and self._world.strikes("loss_not_finite_by_chance")
        groups = self._groups(plan, tables)
        for group in groups:
            is_in_data = self._truth.data.is_not_finite(group.group_id)
            self._world.injected["loss_not_finite"] += is_in_data
            if is_in_data or (by_chance and group.group_id > groups[0].group_id):
                answer = Skipped(reason="the loss", has_changed=before != self._hash)
                break
            self._trained += (group,)
            self._hash = digest(self._hash, group, self._noise)
        self._world.tell(f"applied step {plan.step}: weights {self._hash}, skipped {answer}")
        self._work("answering", 0.1, deadly="rank_death_after_step")
        return answer or {"policy_loss": _as_float(self._hash), "num_tokens": 7.0}

    def publish(self, version: int, incarnation: int, *, offer: None, base: None) -> Publication:
        """Hand out the weights."""
        self._work(f"publishing {version}", 0.5, deadly="rank_death_in_publish")
        if self._world.strikes("rank_death_between_calls"):
            self._world.later(self._world.random.uniform(0.0, 5.0), self._die)
        weights = Weights(incarnation=incarnation, version=version)
        held = Held(weights=weights, hashed=self._hash, gang=self._number)
        self._truth.published(held, self._trained)
        bucket = Bucket(entries=(), num_bytes=0, handle=held)
        return Publication(version=version, incarnation=incarnation, buckets=(bucket,))

    def begin_save(self, directory: str) -> None:
        """Copy the state, and write it while other things happen."""
        self._work("gathering", 0.3, deadly="rank_death_in_gather")
        state = {"hash": self._hash, "trained": [asdict(group) for group in self._trained]}
        self._writing = writing = {"left": NUM_SHARES, "error": None}
        for rank in range(NUM_SHARES):
            path = os.path.join(directory, f"learner-{rank}.json")
            self._world.later(self._world.random.uniform(0.5, 6.0), lambda path=path: self._write(writing, path, state))

    def finish_save(self) -> list[str]:
        """Wait for the writing, and return the names of the files."""
        assert self._writing is not None, "a save has begun"
        writing = self._writing
        until = self._world.now + self._timeout_s
        while writing["left"] and self._is_alive and self._world.now < until:
            self._world.next_event(until)
        self._work("finishing the save", 0.05)
        self._writing = None
        if writing["error"] is not None:
            raise writing["error"]
        return [f"learner-{rank}.json" for rank in range(NUM_SHARES)]

    def load(self, directory: str) -> None:
        """Take a saved state."""
        self._work("loading", 1.0, deadly="rank_death_in_load")
        shares = read_shares(directory)
        if shares[0] != shares[1]:
            self._truth.accusations.append(f"the shares in {directory} are of different states")
        self._hash = shares[0]["hash"]
        self._trained = tuple(Trained(**group) for group in shares[0]["trained"])
        self._world.tell(f"loaded {directory}: weights {self._hash}, {len(self._trained)} groups")

    def rest(self) -> None:
        """Give memory back."""
        self._work("resting", 0.1, deadly="rank_death_in_publish")

    def export(self, directory: str) -> None:
        """The last word of a run: what is in the weights."""
        self._work("exporting", 0.5, deadly="rank_death_in_publish")
        self._truth.exported = (self._hash, self._trained)

    def close(self) -> None:
        """End the ranks."""
        self._truth.living_gangs.discard(self._number)

    @property
    def _is_alive(self) -> bool:
        return self._number in self._truth.living_gangs

    def _die(self) -> None:
        if self._is_alive:
            self._truth.living_gangs.discard(self._number)
            self._disk.damage()

    def _groups(self, plan: Plan, tables: Sequence[pa.Table]) -> list[Trained]:
        groups = []
        for table in tables:
            texts, ids = set(table["response_text"].to_pylist()), set(table["group_id"].to_pylist())
            scores = {dict(components)["share"] for components in table["components"].to_pylist()}
            assert len(ids) == len(texts) == len(scores) == 1, f"a table holds one group, got {ids}"
            (group_id,), (content,), (score,) = ids, texts, scores
            if score != score_of(content):
                self._truth.accusations.append(f"{group_id} was trained with score {score} of another answer")
            groups.append(
                Trained(step=plan.step, group_id=group_id, content=content, score=score, moments=plan.moments)
            )
        return sorted(groups, key=lambda group: group.group_id)

    def _write(self, writing: dict[str, Any], path: str, state: dict[str, Any]) -> None:
        """A rank's thread writes its share; the rank may die over it, or the disk be full."""
        if not self._is_alive or self._world.is_down:
            return
        if self._world.strikes("rank_death_in_write"):
            self._die()
            return
        writing["left"] -= 1
        if self._world.strikes("write_failure"):
            writing["error"] = OSError(errno.ENOSPC, "no space left on device (simulated)", path)
        else:
            self._disk.write_share(path, json.dumps(state))

    def _work(self, what: str, seconds: float, *, deadly: str = "", hanging: str = "") -> None:
        """Let time pass; the ranks may not live to the end of it.

        Raises:
            GangError: when they do not.
        """
        if self._is_alive and hanging and self._world.strikes(hanging):
            self._world.pass_time(self._timeout_s)
            raise GangError(f"{what} must finish within {self._timeout_s:g} s and did not (simulated)")
        self._world.pass_time(self._world.random.uniform(0.2, 1.0) * seconds)
        if self._is_alive and deadly and self._world.strikes(deadly):
            self._die()
        if not self._is_alive:
            raise GangError(f"{what} failed because a rank's process died (simulated)")


def read_shares(directory: str) -> list[dict[str, Any]]:
    """Return what each rank wrote into a checkpoint."""
    shares = []
    for rank in range(NUM_SHARES):
        with open(os.path.join(fetched(directory), f"learner-{rank}.json"), encoding="utf-8") as file:
            shares.append(json.load(file))
    return shares


def first_hash(data_seed: int) -> str:
    """Return the hash of untrained weights."""
    return digest("untrained", data_seed)
