"""The real controller in a simulated world: whatever goes wrong, nothing is lost, trained twice or left hanging."""

import pytest

from benchmarks.simulate import judge_all, report
from cluster.ledger import Ledger
from tests.simulated_mutants import MUTANTS
from tests.simulated_verdict import NUM_DATA, judge, undisturbed_run
from tests.simulated_world import CHANCES, Data

NUM_SCHEDULES = 60
NUM_SEEDS = 200
"""In which each planted bug must be found."""


@pytest.fixture(scope="module")
def verdicts():
    return judge_all(range(NUM_SCHEDULES))


def test_nothing_is_lost_nothing_trained_twice_and_every_run_ends(verdicts):
    assert [str(verdict) for verdict in verdicts if not verdict.is_good] == []
    figures = report(verdicts)
    assert (figures["lost"], figures["duplicated"], figures["unresolved"], figures["wrong"]) == (0, 0, 0, 0)


def test_the_schedules_are_no_stroll(verdicts):
    figures = report(verdicts)
    assert sum(figures["faults"].values()) > 10 * NUM_SCHEDULES
    assert figures["drivers"] > 2 * NUM_SCHEDULES, "drivers die, and others go on"
    assert len(figures["never_injected"]) < len(CHANCES) / 4, "a large batch has all of them, see below"


def test_most_runs_complete(verdicts):
    assert report(verdicts)["gave_up"] < 0.05 * NUM_SCHEDULES


def test_both_kinds_of_machines_are_simulated(verdicts):
    num_exact = sum(verdict.is_exact for verdict in verdicts)
    assert 0.15 < num_exact / NUM_SCHEDULES < 0.75


def test_some_runs_sample_dynamically(verdicts):
    with_waves = [verdict for verdict in verdicts if Data.draw(verdict.seed % NUM_DATA).max_waves is not None]
    assert 0.2 < len(with_waves) / NUM_SCHEDULES < 0.5
    assert sum(verdict.num_uninformative for verdict in with_waves) > NUM_SCHEDULES
    assert not any(verdict.num_uninformative for verdict in verdicts if verdict not in with_waves)


def test_a_seed_is_a_schedule(verdicts):
    busiest = max(verdicts, key=lambda verdict: sum(verdict.injected.values()))
    again = judge(busiest.seed)
    assert (again.trace, again.injected, again.num_events) == (busiest.trace, busiest.injected, busiest.num_events)
    assert len({verdict.trace for verdict in verdicts}) == NUM_SCHEDULES


def test_an_undisturbed_run_trains_on_each_good_group_once():
    data = Data.draw(0)
    undisturbed = undisturbed_run(data)
    _, trained = undisturbed.exported
    assert [row["step"] for row in undisturbed.rows if row["step"]] == list(range(1, data.num_steps + 1))
    skipped = {row["step"] for row in undisturbed.rows if row.get("skipped")}
    assert len(trained) == data.groups_per_step * (data.num_steps - len(skipped))
    assert len({group.group_id for group in trained}) == len(trained)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("late reply accepted", "LedgerError"),
        ("fencing off", "was promised weights"),
        ("TRAINED durable before its checkpoint", "not in the weights, trained"),
        ("lease re-issued with a new seed", "was trained with the answer of"),
        ("redo log written after the step", "must be there to learn step"),
        ("group dropped when it arrives", "the batch of step"),
        ("places filled by arrival", "the batch of step"),
        ("dropped groups forgotten by a replay", "the ledger counts"),
    ],
)
def test_a_planted_bug_is_found(name, found):
    assert any(found in str(judge(seed, planted=MUTANTS[name])) for seed in range(NUM_SEEDS))


def test_a_ledger_that_forgets_a_group_is_found(monkeypatch):
    def forget(self, group_id, step):
        del self._groups[group_id]

    monkeypatch.setattr(Ledger, "train", forget)
    assert "must be trained, dropped" in str(judge(NUM_DATA * 1000))


@pytest.mark.slow
def test_a_thousand_schedules_have_every_kind_of_fault_and_no_bad_end():
    figures = report(judge_all(range(1000, 2000)))
    assert (figures["lost"], figures["duplicated"], figures["unresolved"], figures["wrong"]) == (0, 0, 0, 0)
    assert figures["never_injected"] == []
