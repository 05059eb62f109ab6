"""A scripted gang and the loop's calls on it: for tests of recovery without Ray.

The fake gang's weights are the list of everything it was trained on, in order, with what the controller's plan said, so
a step that is missing, doubled, misordered or planned by a controller in another state shows.
"""

import json
import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from actors.weights import Publication
from cluster.deliveries import delivered, fetched
from cluster.incarnations import DurableIncarnations
from cluster.pipeline import Batch
from cluster.ranks import GangError
from cluster.recovery import RecoveringLearner
from cluster.redo import RedoLog
from cluster.storage import RunStorage
from learner.algorithm_config import AlgorithmConfig, KLConfig
from learner.config import LearnerConfig
from learner.controller import StepController
from learner.learner import Skipped
from reward.config import ComponentConfig, RewardConfig
from reward.samples import samples_of
from reward.schema import SCORED
from tests.simulated_disk import SimulatedDisk
from tests.simulated_driver import Place, SimulatedRun, standing_in
from tests.simulated_run import _config
from tests.simulated_truth import Truth
from tests.simulated_world import Data, World

NUM_STEPS = 6


@dataclass(kw_only=True)
class Script:
    """What is to go wrong; it outlives gangs.  A point is named `verb:when` or `verb:step:when`, and counted."""

    deaths: dict = field(default_factory=dict)
    """Point -> at which of its occurrences, from 1."""
    errors: dict = field(default_factory=dict)
    """Point -> (occurrence, exception)."""
    skips: dict = field(default_factory=dict)
    """Step -> whether its ranks have changed before they skip."""
    reached: Counter = field(default_factory=Counter)
    published: dict = field(default_factory=dict)
    gangs: list = field(default_factory=list)

    def reach(self, *parts):
        point = ":".join(map(str, parts))
        self.reached[point] += 1
        if self.reached[point] in np.atleast_1d(self.deaths.get(point, [])):
            raise GangError(f"a rank died at {point}")
        occurrence, error = self.errors.get(point, (0, None))
        if self.reached[point] == occurrence:
            raise error


class FakeGang:
    def __init__(self, script):
        self.script, self.weights, self.is_closed, self.saving = script, [], False, None
        script.reach("start")
        script.gangs.append(self)

    def wait_ready(self):
        self._alive("ready")

    def check(self):
        self._alive("check")

    def step(self, plan, tables):
        self._alive("step", plan.step, "before")
        entries = [
            [plan.step, plan.kl_coef, plan.scores.tolist(), table["response_text"].to_pylist()] for table in tables
        ]
        if plan.step in self.script.skips:
            if self.script.skips[plan.step]:
                self.weights.append(["half of", plan.step])
            return Skipped(reason="gradient norm nan", has_changed=self.script.skips[plan.step])
        self.weights += entries
        self._alive("step", plan.step, "after")
        return {"loss": float(len(self.weights)), "num_tokens": 1.0}

    def publish(self, version, incarnation, *, offer, base):
        self._alive("publish")
        weights = json.dumps(self.weights)
        assert self.script.published.setdefault((incarnation, version), weights) == weights, "one name, two policies"
        return Publication(version=version, incarnation=incarnation, buckets=())

    def begin_save(self, directory):
        self._alive("gather")
        self.saving = directory, json.dumps(self.weights)

    def finish_save(self):
        self._alive("write")
        directory, text = self.saving
        with delivered(directory, has_hashes=True) as local, open(os.path.join(local, "weights.json"), "w") as file:
            file.write(text)
        self.saving = None
        return ["weights.json"]

    def load(self, directory):
        self._alive("load")
        with open(os.path.join(fetched(directory), "weights.json")) as file:
            self.weights = json.load(file)

    def export(self, directory):
        self._alive("export")

    def close(self):
        self.is_closed = True

    def _alive(self, *parts):
        assert not self.is_closed, f"{parts} of a gang that is gone"
        self.script.reach(*parts)


def controller():
    judge = ComponentConfig(function="tests.rules:share_of_a", normalize="running")
    return StepController(
        RewardConfig(components={"share": judge}),
        LearnerConfig(num_minibatches=1),
        AlgorithmConfig(kl=KLConfig(coef=0.15, controller="adaptive", target=1.0, horizon=100)),
        num_steps=NUM_STEPS,
        seed=3,
        max_new_tokens=8,
    )


def make_batch(step):
    generator = np.random.default_rng(step)
    tables = tuple(_group(f"{step}/{name}", generator) for name in "ab")
    return Batch(
        step=step,
        group_ids=(f"{step}/a", f"{step}/b"),
        tables=tables,
        samples=pa.concat_tables([samples_of(table) for table in tables]),
        after={"prompts": {}, "quarantined": {}},
    )


def _group(group, generator):
    rows = [
        {
            "prompt_id": group[2:], "prompt": "q", "prompt_ids": [1], "extras": "{}", "run_id": "run", "incarnation": 0,
            "group_id": group, "sample_index": index, "lease_id": 1, "response_ids": [1, 2],
            "response_text": f"{group}-{index}", "logprobs": generator.normal(size=2).astype(np.float32).tolist(),
            "policy_versions": [0, 0], "loss_mask": [True, True], "finish_reason": "eos",
            "components": [("share", float(np.float32(generator.normal())))], "token_scores": None, "score_std": None,
            "reward_version": 0, "ref_logprobs": generator.normal(size=2).astype(np.float32).tolist(),
            "reference_version": 0,
        }
        for index in range(2)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=SCORED)


@dataclass(kw_only=True)
class Outcome:
    weights: list
    controller: dict
    metrics: list
    published: list
    learner: RecoveringLearner
    saved: list
    said: list


def learner_on(script, storage, *, learner_type=RecoveringLearner, max_restarts=2, say=lambda text: None, start=None):
    return learner_type(
        start or (lambda: FakeGang(script)),
        controller,
        storage,
        RedoLog(storage),
        incarnations=DurableIncarnations(storage),
        max_restarts=max_restarts,
        say=say,
    )


def train(directory, script, *, until=NUM_STEPS, every=2, storage=None, **options):
    """The loop's calls, in the loop's order; the weights are those of the last gang."""
    storage = storage or RunStorage(str(directory))
    storage.open_for_writing(lambda text: None)
    said = []
    learner = learner_on(script, storage, say=said.append, **options)
    learner.wait_ready()
    redo, metrics, published, saved = RedoLog(storage), [], [], []
    newest = storage.newest_checkpoint()
    if newest is not None:
        learner.restore(*newest)
    published.append(learner.publish(learner.step_done))
    for step in range(learner.step_done + 1, until + 1):
        if not redo.has(step):
            batch = make_batch(step)
            redo.write(batch, pa.concat_tables(batch.tables))
        saved.append(finish(learner))
        result = learner.step(redo.read(step))
        metrics.append({name: value for name, value in result.metrics.items() if not name.endswith("_s")})
        published.append(learner.publish(step))
        if step % every == 0 and result.skipped is None:
            try:
                learner.begin_checkpoint({"run.json": json.dumps({"step": step})})
            except OSError:
                saved.append("failed")
    saved.append(finish(learner))
    weights = learner._gang.weights
    state = learner.controller.state_dict()
    learner.close()
    assert all(gang.is_closed for gang in script.gangs), "no gang is left behind"
    return Outcome(
        weights=weights, controller=state, metrics=metrics, published=published, learner=learner,
        saved=[step for step in saved if step is not None], said=said,
    )  # fmt: skip


def finish(learner):
    try:
        return learner.finish_checkpoint()
    except OSError:
        return "failed"


def planting(script, point, act):
    """Let something happen when a point is reached for the first time."""
    reach = script.reach

    def reach_and_act(*parts):
        if ":".join(map(str, parts)) == point and not script.reached[point]:
            act()
        reach(*parts)

    return reach_and_act


def damage_when(script, point, directory, step, *, how="flipped"):
    path = directory / "checkpoints" / f"step-{step}" / "weights.json"

    def damage():
        if how == "missing":
            path.unlink()
        elif how == "short":
            path.write_bytes(path.read_bytes()[:-1])
        else:
            path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])

    script.reach = planting(script, point, damage)
    return script


@contextmanager
def calm_place(directory):
    """Where the real `Run` drives simulated processes, and nothing goes wrong but what a test brings about itself.

    Four steps of three groups, a checkpoint every two; `said` is what was said, with the time.
    """
    data = Data(
        seed=1,
        num_steps=4,
        groups_per_step=3,
        num_prompts=9,
        malformed=0.0,
        not_finite=0.0,
        num_held_out=0,
        max_waves=None,
        alike=0.0,
        max_staleness=0,
    )
    said = []
    world = World(None, data, said.append)
    disk = SimulatedDisk(world, str(directory))
    place = Place(world=world, truth=Truth(data), disk=disk, config=_config(world, str(directory)))
    with standing_in(place):
        yield lambda: SimulatedRun(place), said
