import pytest

from cluster.ledger import GroupState, Ledger, LedgerError

PATH = (GroupState.GENERATED, GroupState.SCORED, GroupState.BATCHED, GroupState.TRAINED)


def test_every_group_is_counted_in_exactly_one_place():
    ledger = Ledger()
    for name in ("0/a", "0/b", "0/c"):
        ledger.accept(name)
    assert ledger.lease("0/a") == 1
    assert ledger.lease("0/b") == 2
    for state in PATH:
        ledger.move("0/a", state)
    ledger.end("0/b", GroupState.QUARANTINED, "judge refused")
    assert ledger.counts() == {"accepted": 3, "trained": 1, "dropped": 0, "quarantined": 1, "in_flight": 1}


def test_a_second_lease_is_a_fresh_one():
    ledger = Ledger()
    ledger.accept("0/a")
    assert [ledger.lease("0/a"), ledger.lease("0/a")] == [1, 2]


@pytest.mark.parametrize("skipped", range(4))
def test_no_state_can_be_skipped(skipped):
    ledger = Ledger()
    ledger.accept("0/a")
    states = [GroupState.LEASED, *PATH]
    for state in states[:skipped]:
        ledger.move("0/a", state)
    with pytest.raises(LedgerError, match="cannot go from"):
        ledger.move("0/a", states[skipped + 1])


def test_trained_twice_is_refused():
    ledger = Ledger()
    ledger.accept("0/a")
    ledger.lease("0/a")
    for state in PATH:
        ledger.move("0/a", state)
    with pytest.raises(LedgerError, match="cannot go from None to trained"):
        ledger.move("0/a", GroupState.TRAINED)


def test_accepting_twice_is_refused():
    ledger = Ledger()
    ledger.accept("0/a")
    with pytest.raises(LedgerError, match="accepted once"):
        ledger.accept("0/a")


def test_conservation_check_catches_a_lost_group():
    ledger = Ledger()
    ledger.accept("0/a")
    ledger._states.pop("0/a")  # the planted bug: a group vanishes
    with pytest.raises(LedgerError, match="must be trained, dropped"):
        ledger.counts()


def test_snapshot_round_trip_and_refusal_in_flight():
    ledger = Ledger()
    ledger.accept("0/a")
    with pytest.raises(LedgerError, match="in flight"):
        ledger.snapshot()
    ledger.lease("0/a")
    for state in PATH:
        ledger.move("0/a", state)
    other = Ledger()
    other.restore(ledger.snapshot())
    assert other.counts() == ledger.counts()
    other.accept("0/b")
    assert other.lease("0/b") == 2
