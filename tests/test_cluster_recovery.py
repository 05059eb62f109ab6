"""A learner that loses its ranks ends where an undisturbed one ends; ranks, deaths and disks are scripted, no Ray."""

import errno
import os
from itertools import count

import numpy as np
import pyarrow as pa
import pytest

from cluster.pipeline import Batch
from cluster.ranks import GangError
from cluster.recovery import NonFiniteRunError, RecoveringLearner, ReplayError
from cluster.redo import RedoError, RedoLog
from cluster.storage import RunStorage
from tests.recovery_toys import (
    NUM_STEPS,
    FakeGang,
    Outcome,
    Script,
    controller,
    damage_when,
    learner_on,
    make_batch,
    planting,
    train,
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("undisturbed"), Script())


def same(found, expected):
    return (found.weights, found.controller, found.metrics) == (expected.weights, expected.controller, expected.metrics)


def test_an_undisturbed_run_trains_each_step_once(undisturbed):
    steps = [entry[0] for entry in undisturbed.weights]
    assert steps == [step for step in range(1, NUM_STEPS + 1) for _ in "ab"]
    assert undisturbed.saved == [2, 4, 6]
    assert (undisturbed.learner.num_restarts, undisturbed.learner.num_replayed) == (0, 0)
    assert len({entry[1] for entry in undisturbed.weights}) == NUM_STEPS, "the KL coefficient moves with each step"


DEATHS = {
    "start": {"start": 1},
    "ready": {"ready": 1},
    "first publish": {"publish": 1},
    "step 1, before it is applied": {"step:1:before": 1},
    "step 1, after it is applied": {"step:1:after": 1},
    "step 3, first after a checkpoint": {"step:3:after": 1},
    "step 4": {"step:4:before": 1},
    "step 4 applied": {"step:4:after": 1},
    "publish": {"publish": 5},
    "gather": {"gather": 2},
    "write": {"write": 2},
    "first write": {"write": 1},
    "in step, again while loading": {"step:4:after": 1, "load": 1},
    "in step, again while the new gang starts": {"step:4:after": 1, "start": 2},
    "in step, again while the new gang gets ready": {"step:4:after": 1, "ready": 2},
    "in step, again in a replayed step": {"step:4:before": 1, "step:3:after": 2},
    "in step, again in the retried step": {"step:4:after": [1, 2]},
    "in step, again in the retried step before it": {"step:4:before": [1, 2]},
    "in write, again in gather": {"write": 2, "gather": 3},
    "in gather, twice": {"gather": [2, 3]},
    "in publish, in gather, in write": {"publish": 4, "gather": 2, "write": 2},
    "in the last step and its checkpoint": {"step:6:after": 1, "write": 3},
    "in every step": {f"step:{step}:after": 1 for step in range(1, NUM_STEPS + 1)},
}


@pytest.mark.parametrize("deaths", DEATHS.values(), ids=DEATHS.keys())
def test_wherever_the_ranks_die_the_end_is_the_same(undisturbed, tmp_path, deaths):
    script = Script(deaths=deaths)
    found = train(tmp_path, script)
    assert all(script.reached[point] >= np.max(occurrence) for point, occurrence in deaths.items()), "all have fired"
    assert same(found, undisturbed)
    assert found.saved == undisturbed.saved
    expected = sum(np.size(occurrences) for occurrences in deaths.values())
    assert len(found.said) == expected - ("start" in deaths and deaths["start"] == 1)
    assert found.published[-1].version == NUM_STEPS


@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize("step", range(1, NUM_STEPS + 1))
def test_only_the_steps_since_the_checkpoint_are_learnt_again(undisturbed, tmp_path, step, every):
    found = train(tmp_path, Script(deaths={f"step:{step}:after": 1}), every=every)
    assert same(found, undisturbed)
    assert found.learner.num_replayed == (step - 1) % every
    assert found.learner.num_restarts == 1


def test_weights_of_two_lineages_never_share_a_name(tmp_path):
    """The fake gang refuses two policies under one name; here is that a restart raises the incarnation."""
    found = train(tmp_path, Script(deaths={"step:2:after": 1, "step:5:before": 1}))
    names = [(publication.incarnation, publication.version) for publication in found.published]
    assert names == [(0, 0), (0, 1), (1, 2), (1, 3), (1, 4), (2, 5), (2, 6)]


def test_a_continued_run_has_a_new_incarnation_and_the_same_end(undisturbed, tmp_path):
    for until in range(1, NUM_STEPS):
        train(tmp_path, Script(), until=until)
    script = Script(deaths={"load": [1, 2], "step:6:before": 1})
    found = train(tmp_path, script)
    assert (found.weights, found.controller) == (undisturbed.weights, undisturbed.controller)
    assert found.metrics == undisturbed.metrics[-len(found.metrics) :]
    numbers = [publication.incarnation for publication in found.published]
    assert numbers == sorted(numbers)
    assert numbers[0] >= NUM_STEPS - 1, "no process before has had it"


def test_used_up_restarts_end_in_an_error_with_cause_and_remedy(tmp_path):
    script = Script(deaths={"step:3:before": [1, 2, 3]})
    with pytest.raises(GangError, match=r"with 2 restarts .* a rank died at step:3:before; .* raise pipeline.max_rest"):
        train(tmp_path, script)
    assert script.reached["step:3:before"] == 3
    assert RunStorage(str(tmp_path)).newest_checkpoint()[0] == 2, "the checkpoint is intact"
    assert train(tmp_path, Script()).weights[-1][0] == NUM_STEPS


def test_a_completed_call_renews_the_restarts(undisturbed, tmp_path):
    script = Script(deaths={f"step:{step}:after": [1, 2] for step in (1, 3, 5)})
    assert same(train(tmp_path, script), undisturbed)
    assert len(script.gangs) == 7


def test_work_of_a_recovery_does_not_renew_the_restarts(tmp_path):
    """Loading and replaying succeed each time, and yet it ends."""
    script = Script(deaths={"step:4:after": list(range(1, 50))})
    with pytest.raises(GangError, match="with 2 restarts"):
        train(tmp_path, script)
    assert script.reached["load"] == 2


def test_a_mistake_is_not_tried_again(tmp_path):
    mistake = GangError("learning step 2 failed: ValueError: a plan for 2 ranks", ValueError("a plan for 2 ranks"))
    script = Script(errors={"step:2:before": (1, mistake)})
    with pytest.raises(GangError, match="a plan for 2 ranks"):
        train(tmp_path, script)
    assert len(script.gangs) == 1


@pytest.mark.parametrize("has_changed", [False, True])
@pytest.mark.parametrize("step", [1, 2, 3, 6])
def test_a_skipped_step_leaves_no_trace(tmp_path, step, has_changed):
    script = Script(skips={step: has_changed})
    found = train(tmp_path, script)
    steps = [entry[0] for entry in found.weights]
    assert steps == [other for other in range(1, NUM_STEPS + 1) if other != step for _ in "ab"]
    assert [row["skipped"] for row in found.metrics] == [float(other == step) for other in range(1, NUM_STEPS + 1)]
    assert "score_mean" in found.metrics[step - 1], "its samples are shown"
    assert step not in found.saved, "no checkpoint right after it"
    one = controller()
    for other in range(1, NUM_STEPS + 1):
        if other != step:
            samples = make_batch(other).samples
            one.observe(one.plan(other, samples), samples, {})
    assert found.controller == one.state_dict(), "as if the step had not been"
    assert len(script.gangs) == (2 if has_changed and step <= 2 else 1), "new processes only without a checkpoint"


@pytest.mark.parametrize("has_changed", [False, True])
@pytest.mark.parametrize("point", ["step:3:before", "step:4:after", "step:5:after", "write"])
def test_a_skipped_step_is_not_learnt_in_a_recovery(tmp_path, has_changed, point):
    skips = {3: has_changed}
    expected = train(tmp_path / "expected", Script(skips=skips), every=2)
    found = train(tmp_path / "found", Script(skips=skips, deaths={point: 1}), every=2)
    assert same(found, expected)


def test_a_death_on_the_way_back_from_half_a_step(tmp_path):
    expected = train(tmp_path / "expected", Script(skips={4: True}))
    script = Script(skips={4: True}, deaths={"load": 1})
    found = train(tmp_path / "found", script)
    assert script.reached["load"] == 3, "died, for the new gang, and back from the step that was tried again"
    assert same(found, expected)


def test_skipped_steps_are_known_to_a_continued_run_whose_newest_checkpoint_is_damaged(tmp_path):
    skips = {3: True}
    expected = train(tmp_path / "expected", Script(skips=skips))
    train(tmp_path / "found", Script(skips=skips), until=4)
    script = Script(skips=skips, deaths={"step:5:before": 1})
    damaging = damage_when(script, "step:5:before", tmp_path / "found", 4)
    found = train(tmp_path / "found", damaging)
    assert (found.weights, found.controller) == (expected.weights, expected.controller)
    assert script.reached["step:4:before"] == 1, "from checkpoint 2, without step 3"


def test_three_skipped_steps_in_a_row_end_the_run_before_which_the_checkpoint_is(tmp_path):
    script = Script(skips={3: False, 4: True, 5: False})
    with pytest.raises(NonFiniteRunError, match=r"steps 3 to 5: gradient norm nan; .*learning_rate"):
        train(tmp_path, script)
    assert RunStorage(str(tmp_path)).newest_checkpoint()[0] == 2
    with pytest.raises(NonFiniteRunError, match="steps 3 to 5"):
        train(tmp_path, Script(skips=script.skips))


def test_two_and_two_skipped_steps_do_not_end_the_run(tmp_path):
    found = train(tmp_path, Script(skips={1: False, 2: False, 4: True, 5: False}))
    assert {entry[0] for entry in found.weights} == {3, 6}


def test_a_step_that_is_skipped_only_when_it_is_learnt_again_is_an_error(tmp_path):
    script = Script(deaths={"step:4:before": 1})
    script.reach = planting(script, "step:4:before", lambda: script.skips.update({3: False}))
    with pytest.raises(ReplayError, match=r"step 3 must be learnt again as it was the first time, and was skipped"):
        train(tmp_path, script)


@pytest.mark.parametrize("damage", ["missing", "flipped", "short"])
def test_a_damaged_newest_checkpoint_is_left_out(undisturbed, tmp_path, damage):
    script = Script(deaths={"step:5:after": 1})
    found = train(tmp_path, damage_when(script, "step:5:after", tmp_path, 4, how=damage))
    assert same(found, undisturbed)
    assert found.learner.num_replayed == 2, "steps 3 and 4, from checkpoint 2"


def test_without_any_whole_checkpoint_it_starts_from_the_beginning(undisturbed, tmp_path):
    script = Script(deaths={"step:3:after": 1})
    found = train(tmp_path, damage_when(script, "step:3:after", tmp_path, 2))
    assert same(found, undisturbed)
    assert found.learner.num_replayed == 2


def test_a_missing_redo_step_is_an_error_and_not_another_policy(tmp_path):
    script = Script(deaths={"step:4:before": 1})
    path = tmp_path / "rollouts" / "step-3.parquet"
    script.reach = planting(script, "step:4:before", path.unlink)
    with pytest.raises(RedoError, match=r"step-3\.parquet must be there to learn step 3 again"):
        train(tmp_path, script)
    assert all(gang.is_closed for gang in script.gangs[:-1])


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_ranks_that_cannot_write_cost_a_checkpoint_and_nothing_else(undisturbed, tmp_path, nth):
    full = OSError(errno.ENOSPC, "no space left on device")
    script = Script(errors={"write": (nth, full)})
    found = train(tmp_path, script)
    assert same(found, undisturbed)
    assert found.saved == [step if index != nth else "failed" for index, step in enumerate((2, 4, 6), start=1)]
    assert len(script.gangs) == 1
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [f"step-{s}" for s in (2, 4, 6) if s != 2 * nth]


def test_a_full_disk_at_the_beginning_of_a_checkpoint(undisturbed, tmp_path, monkeypatch):
    begin = RunStorage.begin_checkpoint

    def full(self, step):
        if step == 4:
            raise OSError(errno.ENOSPC, "no space left on device")
        return begin(self, step)

    monkeypatch.setattr(RunStorage, "begin_checkpoint", full)
    found = train(tmp_path, Script(deaths={"step:6:after": 1}))
    assert same(found, undisturbed)
    assert found.saved == [2, "failed", 6]


def test_leaving_in_the_middle_of_a_checkpoint_abandons_it(tmp_path):
    storage = RunStorage(str(tmp_path))
    learner = learner_on(Script(), storage)
    batch = make_batch(1)
    RedoLog(storage).write(batch, pa.concat_tables(batch.tables))
    learner.step(batch)
    learner.begin_checkpoint({})
    learner.close()
    assert os.listdir(tmp_path / "checkpoints") == []


def test_a_retried_step_reads_its_rows_from_disk(tmp_path):
    """References of a node that died cannot be read again."""
    storage, script = RunStorage(str(tmp_path)), Script(deaths={"step:1:before": 1})
    learner = learner_on(script, storage)
    batch = make_batch(1)
    RedoLog(storage).write(batch, pa.concat_tables(batch.tables))
    learner.step(Batch(**{name: getattr(batch, name) for name in ("step", "group_ids", "samples")}, tables=("lost",)))
    assert learner._gang.weights[0][3] == batch.tables[0]["response_text"].to_pylist()
    learner.close()


def test_a_check_raises_the_incarnation_and_replaces_dead_ranks(tmp_path):
    storage, script = RunStorage(str(tmp_path)), Script(deaths={"check": 2})
    learner = learner_on(script, storage)
    learner.check()
    assert (learner.incarnation, len(script.gangs)) == (1, 1)
    learner.check()
    assert (learner.incarnation > 1, len(script.gangs)) == (True, 2)
    learner.close()


def test_a_check_while_a_checkpoint_is_written_by_ranks_that_die(undisturbed, tmp_path):
    """What the dead ranks were writing is gathered again from those that replace them."""
    storage, script = RunStorage(str(tmp_path)), Script(deaths={"check": 1})
    learner = learner_on(script, storage)
    for step in (1, 2):
        batch = make_batch(step)
        RedoLog(storage).write(batch, pa.concat_tables(batch.tables))
        learner.step(batch)
    learner.begin_checkpoint({"run.json": "{}"})
    learner.check()
    assert learner.finish_checkpoint() == 2
    learner.close()
    assert same(train(tmp_path, Script()), Outcome(**{**vars(undisturbed), "metrics": undisturbed.metrics[2:]}))


# Planted bugs: each must show in what the tests above compare.


class ForgetsLastStep(RecoveringLearner):
    def _rewind(self, gang, checkpoint):
        self.step_done -= 1
        super()._rewind(gang, checkpoint)
        self.step_done += 1


class ReplaysOnceMore(RecoveringLearner):
    def _learn_again(self, gang, step):
        super()._learn_again(gang, step)
        super()._learn_again(gang, step)


class KeepsController(RecoveringLearner):
    def _rewind(self, gang, checkpoint):
        before = self.controller.state_dict()
        super()._rewind(gang, checkpoint)
        self.controller.load_state_dict(before)


class KeepsGang(RecoveringLearner):
    """Retries a step on ranks that may have applied it."""

    def _lose(self, error):
        self._num_failures += 1


class SkippedStepStaysInController(RecoveringLearner):
    def _learn(self, gang, step, samples, tables):
        result = super()._learn(gang, step, samples, tables)
        if result.skipped is not None:
            self.controller.plan(step, samples)
        return result


class LeavesHalfAStep(RecoveringLearner):
    def _undo(self, gang):
        pass


@pytest.mark.parametrize(
    ("learner_type", "script"),
    [
        (ForgetsLastStep, {"deaths": {"step:4:before": 1}}),
        (ReplaysOnceMore, {"deaths": {"step:4:before": 1}}),
        (KeepsController, {"deaths": {"step:3:after": 1}}),
        (KeepsController, {"deaths": {"step:4:before": 1}}),
        (KeepsGang, {"deaths": {"step:4:after": 1}}),
        (SkippedStepStaysInController, {"skips": {3: False}}),
        (LeavesHalfAStep, {"skips": {3: True}}),
    ],
)
def test_planted_bugs_show(undisturbed, tmp_path, learner_type, script):
    expected = train(tmp_path / "right", Script(**script))
    if not Script(**script).skips:
        assert same(expected, undisturbed)
    assert not same(train(tmp_path / "wrong", Script(**script), learner_type=learner_type), expected)


def test_a_planted_bug_in_the_incarnation_shows(tmp_path):
    """Where a lineage differs a little, as on GPUs, two policies would have one name."""

    def publish_twice(directory, *, has_bug=False):
        script = Script(deaths={"check": 1})

        def differing():
            gang = FakeGang(script)
            gang.weights.append(["noise of gang", len(script.gangs)])
            return gang

        learner = learner_on(script, RunStorage(str(directory)), start=differing)
        if has_bug:
            learner._incarnations = (0 for _ in count())
        learner.publish(0)
        learner.check()
        learner.publish(0)
        learner.close()

    publish_twice(tmp_path / "right")
    with pytest.raises(AssertionError, match="one name, two policies"):
        publish_twice(tmp_path / "wrong", has_bug=True)


def test_a_mistake_in_a_replay_says_what_to_do(tmp_path):
    mistake = GangError("learning step 3 failed: ValueError: too many tokens", ValueError("too many tokens"))
    script = Script(deaths={"step:4:before": 1}, errors={"step:3:before": (2, mistake)})
    with pytest.raises(ReplayError, match=r"step 3 must be .* too many tokens; use the code .* with the same command"):
        train(tmp_path, script)
    assert [gang.is_closed for gang in script.gangs] == [True, True], "not tried again"
