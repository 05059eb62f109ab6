"""Rollout workers and learner take turns with the same memory: what the dispatcher asks of the workers, and when."""

from dataclasses import replace

import pytest

from cluster.config import ConfigError
from cluster.messages import FailureKind, Verb, Weights
from tests.dispatcher_toys import LIMITS, V0, World
from tests.run_toys import minimal_config

V1 = Weights(incarnation=0, version=1)
LATE = replace(LIMITS, loads_late=True)


def test_weights_are_taken_on_when_there_is_work_and_not_before():
    world = World(limits=LATE)
    world.answer_all(Verb.READY)
    world.dispatcher.publish(V0, "weights", 0.0)
    world.collect()
    assert not world.calls(Verb.LOAD)
    world.dispatcher.admit("round", {"a": 1}, world.ledger, 0.0)
    world.collect()
    assert len(world.calls(Verb.LOAD)) == 2
    world.answer_all(Verb.LOAD)
    assert len(world.calls(Verb.GENERATE)) == 1


def test_whoever_rests_wants_the_next_weights_when_there_is_work_again():
    world = _after_a_round()
    world.dispatcher.rest(0.0)
    world.collect()
    assert [str(call.worker) for call in world.calls(Verb.SLEEP)] == ["rollout-0.0", "rollout-1.0"]
    assert world.dispatcher.is_resting
    world.answer_all(Verb.SLEEP)
    assert not world.dispatcher.is_resting
    world.dispatcher.publish(V1, "weights", 0.0)
    world.collect()
    assert not world.calls(Verb.LOAD)
    world.dispatcher.admit("next", {"b": 1}, world.ledger, 0.0)
    world.collect()
    world.answer_all(Verb.LOAD)
    assert [call.lease.weights for call in world.calls(Verb.GENERATE)] == [V1]


def test_a_worker_that_is_still_taking_weights_on_rests_afterwards():
    world = World(limits=LATE)
    world.answer_all(Verb.READY)
    world.dispatcher.publish(V0, "weights", 0.0)
    world.dispatcher.admit("round", {"a": 1}, world.ledger, 0.0)
    world.collect()
    quick, slow = world.calls(Verb.LOAD)
    world.answer(quick, None)
    world.answer_all(Verb.GENERATE, Verb.SCORE)
    world.dispatcher.rest(0.0)
    world.collect()
    assert [str(call.worker) for call in world.calls(Verb.SLEEP)] == ["rollout-0.0"]
    world.answer_all(Verb.SLEEP)
    assert world.dispatcher.is_resting, "the other one is about to hold weights"
    world.answer(slow, None)
    assert [str(call.worker) for call in world.calls(Verb.SLEEP)] == ["rollout-1.0"]
    world.answer_all(Verb.SLEEP)
    assert not world.dispatcher.is_resting


@pytest.mark.parametrize("kind", FailureKind)
def test_a_worker_that_cannot_rest_is_ended(kind):
    world = _after_a_round()
    world.dispatcher.rest(0.0)
    world.collect()
    stubborn, good = world.calls(Verb.SLEEP)
    world.fail(stubborn, kind)
    assert world.killed == [str(stubborn.worker)]
    world.answer(good, None)
    assert not world.dispatcher.is_resting


@pytest.mark.parametrize(
    "pipeline",
    [{"max_staleness": 1}, {"weights": {"transport": "process_group"}}, {"weights": {"delta": True}}],
)
def test_those_who_do_not_take_turns_cannot_share_memory(pipeline):
    with pytest.raises(ConfigError, match=r"placement.colocated must be false with"):
        minimal_config(placement={"colocated": True}, pipeline=pipeline)


@pytest.mark.parametrize(("colocated", "num_ranks"), [(False, 1), (True, 2)])
def test_memory_is_shared_with_the_only_rank_where_both_take_turns(colocated, num_ranks):
    with pytest.raises(ConfigError, match=rf"got shared_memory, with placement.colocated {colocated} and"):
        minimal_config(
            placement={"colocated": colocated},
            learner={"num_ranks": num_ranks},
            pipeline={"weights": {"transport": "shared_memory"}},
        )


def _after_a_round():
    world = World(limits=LATE)
    world.answer_all(Verb.READY)
    world.dispatcher.publish(V0, "weights", 0.0)
    world.dispatcher.admit("round", {"a": 1}, world.ledger, 0.0)
    world.collect()
    world.answer_all(Verb.LOAD)
    world.answer_all(Verb.GENERATE, Verb.SCORE)
    assert world.dispatcher.close_round("round").finished
    return world
