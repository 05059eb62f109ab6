"""A fleet's lists against a look at every member: the same answers, whatever has happened to whom."""

import random
from unittest.mock import patch

import pytest

from cluster import fleet
from cluster.fleet import Fleet, FleetConfig, Member, MemberState
from cluster.messages import Role, Weights

CONFIG = FleetConfig(count=7, max_count=9, capacity=3, ready_timeout_s=1.0, max_restarts=2)
VERSIONS = [Weights(incarnation=i, version=v) for i in range(2) for v in range(3)]


def free(members, weights):
    """The least busy member that can take a group, by looking at all."""
    able = [m for m in members if m.state is MemberState.UP and m.loading is None and m.num_groups < CONFIG.capacity]
    able = [m for m in able if weights is None or m.weights == weights]
    return min(able, key=lambda member: member.num_groups, default=None)


def outdated(members, target):
    """The members that may load, by looking at all."""
    up = [member for member in members if member.state is MemberState.UP and member.loading is None]
    return [member for member in up if member.weights != target and not member.load_failure]


def happen(crew, chance, now):
    """One thing that the dispatcher does to a member."""
    if chance.random() < 0.02:
        crew.grow(1)
    member = chance.choice(crew.members)
    if member.state is MemberState.STARTING:
        crew.up(member, now)
    elif member.state is MemberState.UP:
        match chance.randrange(9):
            case 0 | 1 if member.num_groups < CONFIG.capacity:
                member.num_groups += 1
            case 2 | 3 if member.num_groups:
                member.num_groups -= 1
                crew.succeeded(member)
            case 4:
                member.loading = chance.choice(VERSIONS)
            case 5:
                member.weights, member.loading = member.loading, None
                member.load_failure = chance.choice(["", "", "lost"])
            case 6:
                member.weights = chance.choice(VERSIONS)
            case 7:
                member.load_failure = chance.choice(["", "lost"])
            case 8 if chance.random() < 0.2:
                crew.died(member, "gone", now)


def disagreement(seed):
    """Return what a fleet says first that a look at all its members does not, empty when they agree to the end."""
    chance, crew, seen = random.Random(seed), Fleet(Role.ROLLOUT, CONFIG), {}
    for now in range(300):
        down = [m for m in crew.members if m.state is MemberState.DOWN and m.start_at <= now]
        waiting = sorted(m.start_at for m in crew.members if m.state is MemberState.DOWN)
        if sorted(crew.wakeups()) != waiting or crew.start(now) != [member.worker for member in down]:
            return f"who is started at {now}"
        happen(crew, chance, now)
        members, weights = crew.members, chance.choice([None, *VERSIONS])
        if crew.pick(weights) is not free(members, weights):
            return f"who takes a group at {now}"
        if [id(m) for m in crew.outdated(VERSIONS[0])] != [id(m) for m in outdated(members, VERSIONS[0])]:
            return f"who is outdated at {now}"
        if [m.worker for m in crew.failed_loads()] != [m.worker for m in members if m.load_failure]:
            return f"who failed to load at {now}"
        gone = (MemberState.GIVEN_UP, MemberState.ABSENT)
        settled = all(member.state in (MemberState.UP, *gone) for member in members)
        if crew.is_ready is not settled:
            return f"who is up at {now}"
        if crew.is_empty is not all(member.state in gone for member in members):
            return f"whether anybody is left at {now}"
        changed = {member.worker.slot for member in crew.take_changed()}
        facts = {m.worker.slot: (m.state, m.loading, m.weights, m.num_groups > 0) for m in members}
        if {slot for slot in facts if facts[slot] != seen.get(slot)} - changed:
            return f"who changed at {now}"
        seen = facts
    return ""


@pytest.mark.parametrize("seed", range(8))
def test_the_lists_say_what_a_look_at_every_member_says(seed):
    assert disagreement(seed) == ""


@pytest.mark.parametrize("forgotten", ["state", "weights", "loading", "load_failure", "num_groups"])
def test_a_change_that_is_not_noted_is_found(forgotten):
    with patch.object(fleet, "_NOTED", fleet._NOTED - {forgotten}):
        assert any(disagreement(seed) for seed in range(8))


def test_asking_again_and_again_looks_at_nobody(monkeypatch):
    large = FleetConfig(count=1000, capacity=16, ready_timeout_s=1.0, max_restarts=1)
    crew, looked = Fleet(Role.ROLLOUT, large), []
    crew.start(0.0)
    for member in crew.members:
        crew.up(member, 0.0)
        member.weights = VERSIONS[0]
    crew.pick(VERSIONS[0])
    crew.outdated(VERSIONS[0])
    inner = Member.__getattribute__
    monkeypatch.setattr(
        Member, "__getattribute__", lambda member, name: (looked.append(name), inner(member, name))[1], raising=False
    )
    for _ in range(2_000):
        taker = crew.pick(VERSIONS[0])
        assert taker is not None
        taker.num_groups += 1
        crew.outdated(VERSIONS[0])
        crew.start(0.0)
        list(crew.wakeups())
        assert crew.is_ready
    assert len(looked) < 2_000 * 40, "a look at all would be 1000 a question"
    assert {member.num_groups for member in crew.members} == {2}
