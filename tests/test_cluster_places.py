"""Asking Ray for places: a deadline, an error with what is wanted and what there is, bundles that processes land in."""

import os
import subprocess
import sys
import time

import pytest

from cluster.bundles import BundleGroup
from cluster.hardware import live_nodes
from cluster.placement import PlacementError, plan_placement
from cluster.places import Places, ask_for
from tests.run_toys import minimal_config


def test_what_does_not_come_in_time_is_explained(ray_cluster):
    group = BundleGroup(role="learner", count=4, cpus=0.1, gpus=1.0, strategy="STRICT_PACK")
    started = time.monotonic()
    with pytest.raises(PlacementError) as caught:
        ask_for(group, timeout_s=0.5)
    assert time.monotonic() - started < 10
    text = str(caught.value)
    assert text.startswith("4 x {'CPU': 0.1, 'GPU': 1.0} for the learner (STRICT_PACK) must be free within")
    assert "placement.ready_timeout_s = 0.5 s, and free are 1 node with" in text
    assert "of 1 node with 2 CPUs" in text
    assert "placement.learner_gpus must be at most the 0 GPUs of the largest node" in text


def test_more_cores_than_there_are_name_the_count(ray_cluster):
    group = BundleGroup(role="rollout", count=3, cpus=1.0, gpus=0.0, strategy="SPREAD")
    with pytest.raises(PlacementError, match=r"rollouts\.num_workers must be at most 2 here, got 3"):
        ask_for(group, timeout_s=0.5)


def test_labels_that_no_node_has_name_the_setting(ray_cluster):
    group = BundleGroup(role="reward", count=1, cpus=0.1, gpus=0.0, strategy="PACK", labels={"role": "judge"})
    with pytest.raises(PlacementError, match=r"placement\.reward_labels must be labels of some node, got role=judge"):
        ask_for(group, timeout_s=0.5)


def test_a_place_is_kept_and_given_back(ray_cluster):
    from ray.util.placement_group import remove_placement_group

    group = BundleGroup(role="learner", count=2, cpus=0.5, gpus=0.0, strategy="STRICT_PACK")
    found = ask_for(group, timeout_s=60)
    assert [bundle["CPU"] for bundle in found.bundle_specs] == [0.5, 0.5]
    remove_placement_group(found)


def test_workers_of_the_cpu_are_placed_one_by_one(ray_cluster):
    places = Places(plan_placement(minimal_config(), cores=2), lambda: None, timeout_s=1.0)
    places.reserve()
    assert places.options("rollout", 0) == {"scheduling_strategy": "SPREAD"}
    assert places.options("reward", 0) == {}
    places.close()


def _inside_a_trial(config):
    """Where each process of a run would go, seen from a Tune trial."""
    import ray

    from cluster.placement import join_cluster
    from cluster.places import check_trial

    placement = plan_placement(config, cores=join_cluster(config)[0])
    check_trial(placement)
    places = Places(placement, lambda: None, timeout_s=1.0)
    places.reserve()
    index = [places.options(*of)["scheduling_strategy"].placement_group_bundle_index for of in _WORKERS]
    start = ray.remote(num_cpus=placement.reward.cpus)(lambda: True).options(**places.options("reward", 0)).remote()
    assert ray.get(start, timeout=60)
    return index, placement.learner.threads


_WORKERS = [("rollout", 0), ("rollout", 1), ("reward", 0)]


def _in_group(ray, bundles, config):
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group(bundles)
    inside = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
    try:
        return ray.get(ray.remote(num_cpus=0, scheduling_strategy=inside)(_inside_a_trial).remote(config), timeout=90)
    finally:
        remove_placement_group(group)


def test_inside_a_trial_every_process_has_a_bundle_of_its_own(ray_cluster):
    config = minimal_config(rollouts={"num_workers": 2}, placement={"cores": 1})
    index, threads = _in_group(ray_cluster, [{"CPU": 0.25}] * 4, config)
    assert index == [1, 2, 3], "the rank has the first"
    assert threads == 1, "of one core, whatever the cluster has"


def test_a_trial_without_a_bundle_for_each_process_is_refused_and_does_not_hang(ray_cluster):
    config = minimal_config(rollouts={"num_workers": 2}, placement={"cores": 1})
    with pytest.raises(PlacementError, match=r"bundles must be those of its processes, .*leave a trial's"):
        _in_group(ray_cluster, [{"CPU": 0.25}] * 3, config)


def test_live_nodes_are_what_ray_says(ray_cluster):
    (node,) = live_nodes()
    assert (node.cpus, node.gpus) == (2.0, 0.0)
    assert node.memory_bytes > node.object_store_bytes > 0


FAKE_GPUS = """
import ray
from cluster.placement import gang_group, plan_placement
from cluster.places import Places, ask_for
from cluster.hardware import live_nodes
from tests.run_toys import minimal_config

ray.init(num_cpus=4, num_gpus=2, include_dashboard=False)

class Toy:
    def gpus(self):
        return ray.get_gpu_ids()

config = minimal_config(
    learner={"num_ranks": 2}, rollouts={"num_workers": 2}, reward={"num_workers": 1},
    placement={"learner_gpus": 1, "rollout_gpus": 1.0, "colocated": True},
)
placement = plan_placement(config, cores=4)
gang = ask_for(gang_group(placement.learner, guests=placement.rollout, nodes=live_nodes()), timeout_s=60)
places = Places(placement, lambda: gang, timeout_s=60)
places.reserve()
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as In
toy = ray.remote(Toy)
size = {"num_cpus": placement.learner.cpus, "num_gpus": placement.learner.gpus}
ranks = [toy.options(**size, scheduling_strategy=In(gang, i)).remote() for i in range(2)]
guests = [toy.options(**size, **places.options("rollout", i)).remote() for i in range(2)]
of_ranks, of_guests = (ray.get([actor.gpus.remote() for actor in some], timeout=60) for some in (ranks, guests))
print("GPUS", of_ranks, of_guests)
places.close()
ray.shutdown()
"""


@pytest.mark.slow
def test_a_rank_and_its_guest_have_the_same_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", FAKE_GPUS], env=environment, capture_output=True, text=True, timeout=180, check=True
    )
    ranks, guests = done.stdout.rpartition("GPUS ")[2].strip().split("]] [[")
    assert ranks.lstrip("[") == guests.rstrip("]"), done.stdout
    assert len(set(ranks.lstrip("[").split("], ["))) == 2, "each pair has a GPU of its own"
