"""Time is attributed to what workers did, and to what the idle ones waited for."""

import pytest

from cluster.calls import Calls, Heartbeats
from cluster.fleet import Fleet, FleetConfig
from cluster.messages import Role
from cluster.usage import Activity, Usage


def test_the_example_of_the_module():
    usage = Usage(1, Activity.LEARNER, 0.0)
    usage.observe(0, Activity.BUSY, 0.0)
    usage.observe(0, Activity.IDLE, 4.0)
    usage.observe(0, Activity.WEIGHTS, 6.0)
    usage.observe(0, Activity.BUSY, 7.0)
    assert usage.take(10.0) == [pytest.approx({"busy": 0.7, "learner": 0.2, "weights": 0.1})]
    assert usage.take(14.0) == [{"busy": 1.0}]


def test_idle_time_goes_to_the_reason_of_its_moment():
    """Slot 1 is idle from 2 to 9 s; the buffer is full from 5 to 6 s."""
    usage = Usage(2, Activity.LEARNER, 0.0)
    for slot in range(2):
        usage.observe(slot, Activity.BUSY, 0.0)
    usage.observe(1, Activity.IDLE, 2.0)
    usage.wait_for(Activity.BUFFER, 5.0)
    usage.wait_for(Activity.LEARNER, 6.0)
    usage.observe(1, Activity.BUSY, 9.0)
    busy, idle = usage.take(10.0)
    assert busy == {"busy": 1.0}
    assert idle == pytest.approx({"busy": 0.3, "learner": 0.6, "buffer": 0.1})


def test_heartbeats_look_again_when_a_worker_was_heard_of():
    config = FleetConfig(count=3, capacity=2, ready_timeout_s=30.0, max_restarts=1)
    fleet = Fleet(Role.ROLLOUT, config)
    heartbeats = Heartbeats(5.0, fleet, Calls())
    for member in fleet.members:
        member.num_groups = 1
        heartbeats.watch(member)
    fleet.members[0].heard_at = 3.0
    fleet.members[2].num_groups = 0
    assert heartbeats.due(4.9) == []
    assert heartbeats.due(5.0) == [fleet.members[1].worker], "2 does nothing"
    assert heartbeats.next() == 8.0
    assert heartbeats.due(8.0) == [fleet.members[0].worker]
    assert heartbeats.next() is None, "who is asked is not watched"
