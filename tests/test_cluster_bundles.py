"""Bundles on invented clusters: where a run's processes go, and what is said when they have no place."""

from functools import partial

import pytest

from cluster import bundles
from cluster.bundles import BundleGroup, Node, fit, gang_strategy, has_labels
from cluster.config import ConfigError
from cluster.placement import plan_placement
from tests.checks import Case, Check, with_twins
from tests.run_toys import minimal_config

GPU_NODE = partial(Node, cpus=32.0, gpus=8.0)


def groups_of(nodes, *, cores=64, **sections):
    sections = {"policy": {"dtype": "float32"}, **sections}
    return plan_placement(minimal_config(**sections), cores=cores).groups(nodes)


def placed(nodes, **sections):
    """Return role -> the nodes of its bundles."""
    fits = fit(groups_of(nodes, **sections), nodes)
    assert not any(found.shortage for found in fits), [found.shortage for found in fits]
    return {found.group.role: found.nodes for found in fits}


def shortages(nodes, **sections):
    return {f.group.role: f.shortage for f in fit(groups_of(nodes, **sections), nodes) if f.shortage}


def gpus(*, learner=0, rollout=0.0, reward=0.0, **others):
    return {"learner_gpus": learner, "rollout_gpus": rollout, "reward_gpus": reward, **others}


def test_a_gang_that_fits_on_one_node_stays_there_and_replicas_keep_apart():
    nodes = [GPU_NODE(name="a"), GPU_NODE(name="b"), GPU_NODE(name="c")]
    found = placed(
        nodes,
        learner={"num_ranks": 8},
        rollouts={"num_workers": 4},
        reward={"num_workers": 2},
        placement=gpus(learner=1, rollout=1.0, reward=0.5),
    )
    assert len(set(found["learner"])) == 1
    others = set(range(3)) - set(found["learner"])
    assert sorted(found["rollout"].count(node) for node in others) == [2, 2]


def test_a_gang_that_no_node_holds_is_packed_on_as_few_as_possible():
    nodes = [GPU_NODE(name=name) for name in "abcd"]
    (gang, *_) = groups_of(nodes, learner={"num_ranks": 16}, placement=gpus(learner=1))
    assert gang.strategy == "PACK"
    assert sorted(fit([gang], nodes)[0].nodes.count(node) for node in range(4)) == [0, 0, 8, 8]
    (gang, *_) = groups_of(nodes, learner={"num_ranks": 8}, placement=gpus(learner=1))
    assert gang.strategy == "STRICT_PACK"


def test_replicas_of_several_gpus_fill_node_after_node():
    nodes = [GPU_NODE(name="a", gpus=4.0), GPU_NODE(name="b", gpus=4.0), GPU_NODE(name="c", gpus=2.0)]
    found = placed(
        nodes,
        rollouts={"engine": "vllm", "tensor_parallel": 2, "num_workers": 4},
        placement=gpus(rollout=1.0, reward=1.0),
    )
    assert sorted(found["rollout"].count(node) for node in range(3)) in ([0, 2, 2], [1, 1, 2])
    assert nodes[found["reward"][0]].gpus - 2 * found["rollout"].count(found["reward"][0]) >= 1


def test_shares_of_a_gpu_are_of_one_gpu():
    nodes = [Node(name="a", cpus=16.0, gpus=2.0)]
    assert placed(nodes, rollouts={"num_workers": 2}, placement=gpus(rollout=0.6))["rollout"] == (0, 0)
    # 3 x 0.6 = 1.8 of 2 GPUs, but no third GPU has 0.6 left
    assert (
        "must be at most 2 here, got 3"
        in shortages(nodes, rollouts={"num_workers": 3}, placement=gpus(rollout=0.6))["rollout"]
    )
    assert len(placed(nodes, rollouts={"num_workers": 6}, placement=gpus(rollout=0.3333))["rollout"]) == 6


def test_the_cpu_alone():
    nodes = [Node(name="laptop", cpus=2.0)]
    found = fit(groups_of(nodes, cores=2), nodes)
    assert [one.nodes for one in found] == [(0,)] * 3
    assert found[0].group.resources == {"CPU": 0.66}


def test_roles_stay_on_their_labelled_nodes():
    nodes = [GPU_NODE(name=role, labels={"role": role}) for role in ("reward", "rollout", "learner")]
    found = placed(
        nodes,
        learner={"num_ranks": 2},
        placement=gpus(
            learner=1, rollout=1.0, reward=1.0,
            learner_labels={"role": "learner"}, rollout_labels={"role": "!in(learner,reward)"},
            reward_labels={"role": "in(reward, head)"},
        ),
    )  # fmt: skip
    assert found == {"learner": (2, 2), "rollout": (1,), "reward": (0,)}


def test_whoever_shares_a_gpu_is_in_one_bundle():
    nodes = [Node(name="a", cpus=16.0, gpus=2.0)]
    sections = {
        "learner": {"num_ranks": 2},
        "rollouts": {"num_workers": 2},
        "placement": gpus(learner=1, rollout=1.0, colocated=True),
    }
    gang, reward = groups_of(nodes, cores=16, **sections)
    assert (gang.resources, gang.count, reward.role) == ({"CPU": 2.0, "GPU": 1.0}, 2, "reward")
    placement = plan_placement(minimal_config(**sections), cores=16)
    assert (placement.learner.gpus, placement.rollout.gpus) == (0.5, 0.5), "Ray counts half of the GPU for each"
    assert not shortages(nodes, **sections), "2 GPUs are enough for two ranks and two workers"


@pytest.mark.parametrize(
    ("sections", "role", "expected"),
    [
        (
            {"learner": {"num_ranks": 9}, "placement": gpus(learner=1)},
            "learner",
            "learner.num_ranks must be at most 8 here, got 9",
        ),
        (
            {
                "rollouts": {"engine": "vllm", "tensor_parallel": 16},
                "placement": gpus(rollout=1.0),
            },
            "rollout",
            "rollouts.tensor_parallel must be at most the 8 GPUs of the largest node, got 16",
        ),
        (
            {"placement": gpus(reward=1.0, reward_labels={"role": "judge"})},
            "reward",
            "placement.reward_labels must be labels of some node, got role=judge, and there is 1 node",
        ),
        (
            {"reward": {"num_workers": 17}, "placement": gpus(reward=0.5)},
            "reward",
            "lower reward.num_workers or placement.reward_gpus, or add nodes",
        ),
        (
            {"placement": {"cores": 66}},
            "reward",
            "lower reward.num_workers or placement.cores, or add nodes",
        ),
    ],
)
def test_a_shortage_names_the_setting_and_what_there_is(sections, role, expected):
    assert expected in shortages([GPU_NODE(name="a")], **sections)[role]


def test_each_role_without_a_place_is_named():
    sections = {
        "learner": {"num_ranks": 4},
        "rollouts": {"num_workers": 4},
        "placement": gpus(learner=1, rollout=1.0, reward=1.0),
    }
    found = shortages([Node(name="a", cpus=8.0, gpus=2.0)], **sections)
    assert set(found) >= {"learner", "rollout"}


def test_settings_of_gpus_that_do_not_go_together_are_refused():
    vllm = {"engine": "vllm", "tensor_parallel": 2}
    for sections, expected in (
        ({"rollouts": {"tensor_parallel": 2}}, "tensor_parallel must be 1 with engine torch"),
        ({"rollouts": vllm, "placement": gpus(rollout=0.5)}, "placement.rollout_gpus must be 0 or 1 with"),
        ({"placement": gpus(rollout=2.0)}, "placement.rollout_gpus must be less than or equal to 1"),
        ({"placement": gpus(learner=1, colocated=True), "policy": {"model": "a/b", "dtype": "float32"}}, "both be 1"),
        (
            {"placement": gpus(learner=1, rollout=1.0, colocated=True), "rollouts": {"num_workers": 2}},
            "rollouts.num_workers must be learner.num_ranks = 1",
        ),
        (
            {"placement": gpus(learner=1, rollout=1.0, colocated=True, rollout_labels={"a": "b"})},
            "placement.rollout_labels must be left out",
        ),
    ):
        with pytest.raises(ConfigError, match=expected.replace(".", r"\.")):
            minimal_config(**sections)


def gang_is_on_one_node(place):
    """Two nodes with 3 and 4 free GPUs: a gang of 4 that must be together fits on the second only."""
    gang = BundleGroup(role="learner", count=4, cpus=1.0, gpus=1.0, strategy="STRICT_PACK")
    nodes = [Node(name="a", cpus=8.0, gpus=3.0), Node(name="b", cpus=8.0, gpus=4.0)]
    assert place([gang], nodes)[0].nodes == (1, 1, 1, 1)


def large_bundles_come_first(place):
    """One node with 4 GPUs: a replica of 4 fits only if the small worker, named first, goes elsewhere."""
    small = BundleGroup(role="reward", count=1, cpus=1.0, gpus=1.0, strategy="SPREAD")
    large = BundleGroup(role="rollout", count=1, cpus=1.0, gpus=4.0, strategy="PACK")
    nodes = [Node(name="a", cpus=8.0, gpus=4.0), Node(name="b", cpus=8.0, gpus=1.0)]
    assert [found.nodes for found in place([small, large], nodes)] == [(1,), (0,)]


def _without_order(groups, nodes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles, "_difficulty", lambda group: 0)
        return fit(groups, nodes)


def _as_if_packed(groups, nodes):
    loose = [BundleGroup(role=g.role, count=g.count, cpus=g.cpus, gpus=g.gpus, strategy="SPREAD") for g in groups]
    return fit(loose, nodes)


CHECKS = (
    Check(id="gang", run=gang_is_on_one_node, part=fit, twins={"spread": _as_if_packed}),
    Check(id="large-first", run=large_bundles_come_first, part=fit, twins={"as-named": _without_order}),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


@pytest.mark.parametrize(
    ("selector", "matching"),
    [("gpu", {"gpu"}), ("!gpu", {"cpu", None}), ("in(gpu, cpu)", {"gpu", "cpu"}), ("!in(gpu,cpu)", {None})],
)
def test_selectors(selector, matching):
    kinds = {kind: {} if kind is None else {"kind": kind} for kind in ("gpu", "cpu", None)}
    assert {kind for kind, labels in kinds.items() if has_labels(labels, {"kind": selector})} == matching


def test_the_gang_is_asked_onto_one_node_only_where_its_labels_allow():
    nodes = [GPU_NODE(name="a"), GPU_NODE(name="b", gpus=2.0, labels={"role": "learner"})]
    ask = partial(gang_strategy, 4, cpus=1.0, gpus=1.0, nodes=nodes)
    assert ask(labels={}) == "STRICT_PACK"
    assert ask(labels={"role": "learner"}) == "PACK"
