"""The dispatcher and its fleets against a scripted world: replies and the time go in, commands come out."""

from dataclasses import replace

import pytest

from cluster.fleet import Fleet, FleetConfig, FleetError
from cluster.limits import DataError, Limits, RetriesError
from cluster.messages import FailureKind, Role, Verb, Weights
from tests.dispatcher_toys import LIMITS, V0, World


def test_groups_go_to_the_least_busy_worker_and_are_judged_as_they_come():
    world = World()
    round_ = world.begin("a", "b", "c", "d", "e")
    assert [(call.lease.group_id, str(call.worker)) for call in world.calls(Verb.GENERATE)] == [
        ("a", "rollout-0.0"), ("b", "rollout-1.0"), ("c", "rollout-0.0"), ("d", "rollout-1.0"),
    ]  # fmt: skip
    assert world.calls(Verb.GENERATE)[0].payload == "work a"
    world.answer(world.calls(Verb.GENERATE)[1], "rollouts b")
    assert [call.payload for call in world.calls(Verb.SCORE)] == ["rollouts b"]
    assert [call.lease.group_id for call in world.calls(Verb.GENERATE)] == ["a", "c", "d", "e"], "a place for e"
    world.answer_all(Verb.GENERATE, Verb.SCORE)
    assert round_.is_done
    assert round_.finished == {group: f"score of {group}" for group in "abcde"}
    assert world.dispatcher.close_round("round") is round_
    assert all(count == 0 for count in world.dispatcher.counters.values())


def test_nobody_generates_before_it_has_the_weights():
    world = World(rollouts=1)
    world.answer_all(Verb.READY)
    world.dispatcher.admit("round", {"a": 1}, world.ledger, 0.0)
    world.collect()
    assert not world.calls(Verb.GENERATE)
    world.dispatcher.publish(V0, "weights", 0.0)
    world.collect()
    assert [call.payload for call in world.calls(Verb.LOAD)] == ["weights"]
    assert not world.calls(Verb.GENERATE)
    world.answer_all(Verb.LOAD)
    assert [call.lease.weights for call in world.calls(Verb.GENERATE)] == [V0]


@pytest.mark.parametrize("newer", [Weights(incarnation=0, version=1), Weights(incarnation=1, version=0)])
def test_a_late_load_of_older_weights_does_not_make_a_worker_current(newer):
    world = World(rollouts=1)
    world.answer_all(Verb.READY)
    world.dispatcher.publish(V0, "old", 0.0)
    world.collect()
    world.dispatcher.publish(newer, "new", 0.0)
    world.dispatcher.admit("round", {"a": 1}, world.ledger, 0.0)
    world.collect()
    (old,) = world.calls(Verb.LOAD)
    world.answer(old, None)
    assert not world.calls(Verb.GENERATE)
    assert [call.payload for call in world.calls(Verb.LOAD)] == ["new"]
    world.answer_all(Verb.LOAD)
    assert world.calls(Verb.GENERATE)[0].lease.weights == newer


def test_a_dead_worker_is_replaced_and_its_groups_go_first():
    world = World(rollouts=1, capacity=2)
    world.begin("a", "b", "c")
    a, b = world.calls(Verb.GENERATE)
    world.fail(a, FailureKind.DIED)
    assert world.killed == ["rollout-0.0"]
    assert world.started == ["rollout-0.0", "reward-0.0", "rollout-0.1"]
    world.open.pop(b.call_id)
    world.answer_all(Verb.READY)
    assert not world.calls(Verb.GENERATE), "current weights first"
    world.answer_all(Verb.LOAD)
    assert [(c.lease.group_id, c.lease.lease_id) for c in world.calls(Verb.GENERATE)] == [("a", 3), ("b", 4)]
    assert world.dispatcher.counters["num_retries"] == 2
    world.answer(b, "late")
    assert world.dispatcher.counters["num_fenced"] == 1
    world.answer_all(Verb.GENERATE, Verb.SCORE)
    assert world.dispatcher.round("round").is_done
    assert world.dispatcher.round("round").finished["b"] == "score of b"


def rounds_ahead(*, max_buffer_bytes):
    """Return a world with the groups of steps 1 and 2, and how many were sent when each had been generated."""
    world = World(rollouts=1, capacity=1, limits=replace(LIMITS, max_buffer_bytes=max_buffer_bytes))
    world.begin()
    world.dispatcher.close_round("round")
    for step, groups in ((1, "ab"), (2, "cd")):
        world.dispatcher.admit(step, {group: group for group in groups}, world.ledger, 0.0, rank=step)
    world.collect()
    order = []
    while calls := world.calls(Verb.GENERATE):
        order.append(calls[0].lease.group_id)
        world.answer(calls[0], (f"rows of {order[-1]}", {"num_bytes": 100}))
    return world, "".join(order)


def test_groups_of_later_steps_wait_for_room_in_the_buffer():
    assert rounds_ahead(max_buffer_bytes=400)[1] == "abcd"
    world, order = rounds_ahead(max_buffer_bytes=300)
    assert order == "abc"
    assert world.dispatcher.depths["buffer_bytes"] == 300
    world, order = rounds_ahead(max_buffer_bytes=0)
    assert order == "ab", "the first open step is never held back"
    world.answer_all(Verb.SCORE)
    world.now = 4.0
    world.dispatcher.close_round(1)
    world.tick(4.0)
    assert [call.lease.group_id for call in world.calls(Verb.GENERATE)] == ["c"], "step 2 is the first one now"
    usage = world.dispatcher.usage.take_metrics(8.0)
    assert (usage["idle_rollout_buffer"], usage["idle_rollout_learner"]) == (0.5, 0.0)


def test_a_group_drawn_late_for_an_early_step_goes_first():
    world = World(rollouts=1, capacity=1)
    world.begin()
    for step, group in ((1, "a"), (2, "b"), (1, "c")):
        world.dispatcher.admit(step, {group: group}, world.ledger, 0.0, rank=step)
    world.collect()
    world.answer(world.calls(Verb.GENERATE)[0])
    assert [call.lease.group_id for call in world.calls(Verb.GENERATE)] == ["c"]


def test_forgotten_answers_would_be_noticed():
    """The planted bug: a late answer is taken; the ledger refuses its lease."""
    world = World(rollouts=2)
    world.begin("a")
    (a,) = world.calls(Verb.GENERATE)
    (pending,) = world.dispatcher.calls.of(a.worker)
    world.fail(a, FailureKind.INFRA)
    world.tick(1.0)
    (again,) = world.calls(Verb.GENERATE)
    world.answer(again, "rollouts")
    world.dispatcher.calls.add(pending)
    with pytest.raises(RuntimeError, match=r"lease|cannot go"):
        world.answer(a, "late")


def test_a_hung_worker_is_killed_at_the_deadline():
    world = World(rollouts=2, capacity=1)
    world.begin("a", "b")
    a, b = world.calls(Verb.GENERATE)
    assert world.dispatcher.next_wakeup() == 10.0
    world.now = 9.0
    world.answer(b, "rollouts")
    world.tick(9.9)
    assert world.killed == []
    world.tick(10.0)
    assert world.killed == [str(a.worker)]
    assert [c.lease.group_id for c in world.calls(Verb.GENERATE) if c is not a] == ["a"], "the healthy one takes it"
    assert world.dispatcher.counters["num_deadlines"] == 1


def test_a_silent_worker_is_asked_and_killed():
    limits = Limits(timeout_s=1000.0, heartbeat_s=6.0, max_retries=3, max_quarantined=1)
    world = World(rollouts=1, limits=limits)
    world.begin("a")
    assert world.dispatcher.next_wakeup() == 3.0
    world.tick(3.0)
    (ping,) = world.calls(Verb.PING)
    world.answer(ping)
    world.tick(5.9)
    assert not world.calls(Verb.PING)
    world.tick(6.0)
    assert world.calls(Verb.PING)
    world.tick(11.9)
    assert world.killed == []
    world.tick(12.0)
    assert world.killed == ["rollout-0.0"]


def test_a_dead_reward_worker_loses_no_rollouts():
    world = World(rewards=2, capacity=1)
    world.begin("a")
    world.answer_all(Verb.GENERATE)
    (score,) = world.calls(Verb.SCORE)
    world.fail(score, FailureKind.DIED)
    assert [(c.payload, str(c.worker)) for c in world.calls(Verb.SCORE)] == [("generate of a", "reward-1.0")]
    world.answer_all(Verb.SCORE)
    assert world.dispatcher.round("round").is_done


def test_a_judge_that_lost_its_input_makes_the_group_generated_again():
    world = World()
    world.begin("a")
    world.answer_all(Verb.GENERATE)
    world.fail(world.calls(Verb.SCORE)[0], FailureKind.INFRA, "object lost")
    assert not world.calls(Verb.GENERATE)
    assert world.dispatcher.next_wakeup() == 0.5
    world.tick(0.5)
    assert [c.lease.lease_id for c in world.calls(Verb.GENERATE)] == [2]


def test_a_backoff_that_is_over_asks_for_no_look_at_the_clock():
    world = World(rollouts=1, capacity=1)
    world.begin("a", "b")
    world.fail(world.calls(Verb.GENERATE)[0], FailureKind.INFRA)
    assert [call.lease.group_id for call in world.calls(Verb.GENERATE)] == ["b"]
    assert world.dispatcher.next_wakeup() == 0.5
    world.tick(0.5)
    assert world.dispatcher.next_wakeup() == 10.0, "the deadline of b; a waits for the worker, not for the time"


def test_restarts_back_off_and_an_empty_fleet_is_an_error():
    world = World(rollouts=1, max_restarts=2)
    world.begin("a")
    world.fail(world.calls(Verb.GENERATE)[0], FailureKind.DIED, "killed")
    world.fail(world.calls(Verb.READY)[0], FailureKind.DIED, "killed")
    assert world.started[-1] == "rollout-0.1"
    world.tick(0.49)
    assert world.started[-1] == "rollout-0.1"
    world.tick(0.5)
    assert world.started[-1] == "rollout-0.2"
    assert world.dispatcher.error is None
    world.fail(world.calls(Verb.READY)[0], FailureKind.DIED, "out of memory")
    assert isinstance(world.dispatcher.error, FleetError)
    assert "rollout-0.2: out of memory" in str(world.dispatcher.error)
    assert "pipeline.max_restarts" in str(world.dispatcher.error)


def test_a_success_renews_the_budget():
    world = World(rollouts=1, capacity=1, max_restarts=1)
    world.begin("a", "b", "c", "d")
    for _ in range(3):
        world.answer(world.calls(Verb.GENERATE)[0], "rollouts")
        world.fail(world.calls(Verb.GENERATE)[0], FailureKind.DIED)
        world.answer_all(Verb.READY, Verb.LOAD)
    assert world.dispatcher.error is None
    assert world.started[-1] == "rollout-0.3"
    world.fail(world.calls(Verb.GENERATE)[0], FailureKind.DIED)
    assert isinstance(world.dispatcher.error, FleetError), "two in a row"


def test_a_constructor_that_raises_ends_the_run_at_once():
    world = World(rollouts=1, max_restarts=5)
    world.fail(world.calls(Verb.READY, "rollout-0.0")[0], FailureKind.DATA, "FileNotFoundError: model")
    assert isinstance(world.dispatcher.error, FleetError)
    assert "cannot start: FileNotFoundError: model" in str(world.dispatcher.error)


def test_a_worker_that_has_no_place_is_an_error_after_the_ready_timeout():
    world = World()
    world.answer_all(Verb.LOAD)
    world.answer(world.calls(Verb.READY, "rollout-0.0")[0])
    world.tick(30.0)
    assert "must be ready within 30 s" in str(world.dispatcher.error)
    assert not world.dispatcher.is_ready


def test_infrastructure_failures_have_a_budget_for_each_group():
    world = World(rewards=1)
    world.begin("a")
    for attempt in range(4):
        assert world.dispatcher.error is None
        world.answer_all(Verb.GENERATE)
        world.fail(world.calls(Verb.SCORE)[0], FailureKind.INFRA, "judge away")
        world.tick(world.now + 2.0**attempt)
    assert isinstance(world.dispatcher.error, RetriesError)
    assert "group a" in str(world.dispatcher.error)
    assert world.killed == [], "its process is not to blame"


@pytest.mark.parametrize("verb", [Verb.GENERATE, Verb.SCORE])
def test_a_bad_group_is_tried_once_more_and_then_quarantined(verb):
    world = World()
    round_ = world.begin("a", "b", "c")
    for _ in range(2):
        if verb is Verb.SCORE:
            world.answer_all(Verb.GENERATE)
        (bad,) = [call for call in world.calls(verb) if call.lease.group_id == "a"] or [None]
        world.fail(bad, FailureKind.DATA, "not finite")
    world.answer_all(Verb.GENERATE, Verb.SCORE)
    assert round_.quarantined == {"a": f"{verb}: not finite"}
    assert round_.is_done
    assert sorted(round_.finished) == ["b", "c"]
    assert world.dispatcher.error is None
    assert world.ledger.counts()["quarantined"] == 1


def test_too_many_bad_groups_are_an_error():
    world = World()
    world.begin("a", "b")
    while world.dispatcher.error is None:
        world.fail(world.calls(Verb.GENERATE)[0], FailureKind.DATA, "too long")
    assert isinstance(world.dispatcher.error, DataError)
    assert "at most 1 groups may be quarantined, and group b" in str(world.dispatcher.error)


def test_lost_weights_stop_loads_until_they_are_published_again():
    world = World(rollouts=1)
    world.answer_all(Verb.READY)
    world.dispatcher.publish(V0, "weights", 0.0)
    world.collect()
    world.fail(world.calls(Verb.LOAD)[0], FailureKind.INFRA, "owner died")
    assert world.dispatcher.distribution.lost == "rollout-0.0: owner died"
    assert not world.calls(Verb.LOAD)
    world.dispatcher.publish(Weights(incarnation=1, version=0), "again", 0.0)
    world.collect()
    assert [call.payload for call in world.calls(Verb.LOAD)] == ["again"]
    assert not world.dispatcher.distribution.lost


def test_one_death_during_a_fetch_holds_nobody():
    world = World(rollouts=2)
    world.answer_all(Verb.READY)
    world.dispatcher.publish(V0, "weights", 0.0)
    world.dispatcher.admit("round", {"a": 1}, world.ledger, 0.0)
    world.collect()
    first, second = world.calls(Verb.LOAD)
    world.fail(first, FailureKind.DIED)
    world.answer(second, None)
    assert [str(call.worker) for call in world.calls(Verb.GENERATE)] == [str(second.worker)]


def test_a_worker_that_fails_while_others_work_is_ended():
    world = World(rollouts=2, capacity=1)
    world.begin(*"abcdefgh")
    sick = "rollout-0.0"
    for _ in range(2):
        world.fail(world.calls(Verb.GENERATE, sick)[0], FailureKind.INFRA, "device lost")
    assert world.killed == [sick], "the least busy worker would draw every group"
    assert "failed 2 times in a row, the last time: device lost" in world.dispatcher.take_notes()[0]


def test_an_outage_that_all_judges_feel_ends_none_of_them():
    world = World(rollouts=1, rewards=2, capacity=1)
    world.begin("a", "b")
    world.answer_all(Verb.GENERATE)
    for call in world.calls(Verb.SCORE):
        world.fail(call, FailureKind.INFRA, "judge away")
    world.tick(0.5)
    world.answer_all(Verb.GENERATE)
    for call in world.calls(Verb.SCORE):
        world.fail(call, FailureKind.INFRA, "judge away")
    assert world.killed == []


def test_a_worker_that_cannot_load_what_another_has_loaded_waits_and_is_ended_the_second_time():
    world = World(rollouts=2)
    world.answer_all(Verb.READY)
    world.dispatcher.publish(V0, "weights", 0.0)
    world.collect()
    first, second = world.calls(Verb.LOAD)
    world.fail(first, FailureKind.INFRA, "timeout")
    assert not world.dispatcher.distribution.lost, "the other one may get it"
    world.answer(second, None)
    world.tick(1.0)
    assert (world.calls(Verb.LOAD), world.killed) == ([], []), "what was published may be lost, and it is not to blame"
    world.dispatcher.publish(Weights(incarnation=0, version=1), "newer", 1.0)
    world.collect()
    again, other = sorted(world.calls(Verb.LOAD), key=lambda call: call.worker != first.worker)
    world.answer(other, None)
    world.fail(again, FailureKind.INFRA, "timeout")
    assert world.killed == [str(first.worker)]
    assert not world.dispatcher.distribution.lost


def test_a_place_given_up_over_a_load_holds_nobody():
    world = World(rollouts=2, max_restarts=0)
    world.answer_all(Verb.READY)
    world.dispatcher.publish(V0, "weights", 0.0)
    world.collect()
    first, second = world.calls(Verb.LOAD)
    world.fail(first, FailureKind.INFRA, "owner died")
    world.fail(second, FailureKind.DIED)
    assert world.dispatcher.distribution.lost, "nobody is left who could still get them"


def test_a_constructor_that_raises_later_costs_a_restart():
    world = World(rollouts=1, max_restarts=3)
    world.begin("a")
    world.fail(world.calls(Verb.GENERATE)[0], FailureKind.DIED)
    world.fail(world.calls(Verb.READY)[0], FailureKind.DATA, "device memory not free yet")
    assert world.dispatcher.error is None
    world.tick(0.5)
    assert world.started[-1] == "rollout-0.2"


def test_deaths_are_told():
    world = World(rollouts=1, max_restarts=1)
    world.begin("a")
    world.fail(world.calls(Verb.GENERATE)[0], FailureKind.DIED, "killed")
    world.fail(world.calls(Verb.READY)[0], FailureKind.DIED, "killed")
    assert world.dispatcher.take_notes() == [
        "rollout-0.0: killed; rollout-0.1 takes its place (failure 1, 1 allowed)",
        "rollout-0.1: killed; its place is given up after 2 failures in a row",
    ]
    assert world.dispatcher.counters["num_given_up"] == 1


def test_the_work_for_a_round_grows_with_its_groups_and_not_faster(monkeypatch):
    picks = []
    pick = Fleet.pick
    monkeypatch.setattr(Fleet, "pick", lambda fleet, weights: (picks.append(1), pick(fleet, weights))[1])
    world = World(rollouts=2, capacity=4)
    world.begin(*(f"g{number}" for number in range(300)))
    world.answer_all(Verb.GENERATE, Verb.SCORE)
    assert world.dispatcher.round("round").is_done
    assert len(picks) < 300 * 8


def test_fleet_backoff_is_bounded():
    fleet = Fleet(Role.REWARD, FleetConfig(count=1, capacity=1, ready_timeout_s=1.0, max_restarts=100))
    waits = []
    for _ in range(12):
        fleet.start(1e9)
        fleet.died(fleet.members[0], "x", 0.0)
        waits.append(fleet.members[0].start_at)
    assert waits == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 30.0, 30.0]
