import pytest

from cluster.placement import plan_placement
from cluster.plan import batch_plan
from tests.run_toys import minimal_config


def test_numbers_of_a_step():
    config = minimal_config(
        rollouts={"prompts_per_step": 6, "samples_per_prompt": 4, "max_new_tokens": 10},
        learner={"epochs": 2, "num_minibatches": 3, "num_ranks": 2},
    )
    plan = batch_plan(config)
    assert plan["sequences per step"] == 24
    assert plan["optimizer updates per step"] == 6
    assert plan["optimizer updates in all"] == 12
    assert plan["sequences per rank"].startswith("about 12")


@pytest.mark.parametrize("cores", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_stages_that_overlap_share_the_cores(cores, workers):
    config = minimal_config(rollouts={"num_workers": workers}, learner={"num_ranks": 2})
    placement = plan_placement(config, cores=cores)
    busy = [role.count * role.threads for role in placement.all]
    minimum = [role.count for role in placement.all]  # a process has at least one thread
    assert busy[0] + busy[1] <= max(cores, minimum[0] + minimum[1])
    assert busy[2] <= max(cores, minimum[2])
    assert sum(role.count * role.cpus for role in placement.all) <= cores, "Ray can place all of them at once"


def test_two_cores():
    placement = plan_placement(minimal_config(), cores=2)
    assert [role.threads for role in placement.all] == [1, 1, 2]


def test_named_threads_win():
    placement = plan_placement(minimal_config(placement={"learner_threads": 1, "rollout_threads": 3}), cores=2)
    assert (placement.rollout.threads, placement.learner.threads) == (3, 1)


def test_no_process_has_more_threads_than_its_node():
    placement = plan_placement(minimal_config(), cores=64, node_cores=4)
    assert [role.threads for role in placement.all] == [4, 4, 4]
