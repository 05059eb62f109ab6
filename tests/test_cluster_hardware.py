"""Machines from a line, a file, or a Ray cluster's YAML."""

import os

import pytest

from cluster.config import ConfigError
from cluster.hardware import GB, described, this_machine

RAY_CLUSTER = os.path.join(os.path.dirname(os.path.dirname(__file__)), "ray_cluster.yaml")


def test_one_node():
    (node,) = described("8xH100-80GB").nodes
    assert (node.gpus, node.gpu_bytes, node.cpus, node.memory_bytes) == (8, 80 * GB, 64, None)


def test_nodes_of_two_kinds_with_cores_memory_and_labels():
    hardware = described("2x8xH200,96cpu,1000GB,role=learner+4x16cpu,64GB")
    assert [(node.gpus, node.cpus) for node in hardware.nodes] == [(8, 96)] * 2 + [(0, 16)] * 4
    first = hardware.nodes[0]
    assert (first.gpu_bytes, first.memory_bytes, first.object_store_bytes) == (141 * GB, 1000 * GB, 200 * GB)
    assert first.labels["role"] == "learner"
    assert (hardware.cores, hardware.node_cores, hardware.num_gpus) == (256, 16, 16)
    assert len({node.name for node in hardware.nodes}) == 6


@pytest.mark.parametrize(
    ("text", "size"), [("1xA100-40GB", 40), ("1xA100-80G", 80), ("1xRTX-PRO-6000", 96), ("1xMyGPU-12GB", 12)]
)
def test_names_of_gpus(text, size):
    assert described(text).nodes[0].gpu_bytes == size * GB


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8xV100", "must name a GPU's memory, like 8xV100-80GB"),
        ("eight", "must be a description of nodes or a file, got 'eight'"),
        ("64GB", "must describe nodes with GPUs or cores, got '64GB'"),
        ("2x8xH100,role", "got 'role'"),
    ],
)
def test_a_mistake_is_answered_with_how_to_write_it(text, expected):
    with pytest.raises(ConfigError, match=expected):
        described(text)


def test_a_file_of_nodes(tmp_path):
    path = tmp_path / "nodes.yaml"
    path.write_text("nodes: [{count: 2, gpus: 4, gpu_gb: 48, memory_gb: 384, labels: {role: learner}}, {cpus: 8}]")
    nodes = described(str(path)).nodes
    assert [(node.gpus, node.gpu_bytes, node.cpus) for node in nodes] == [(4, 48 * GB, 32)] * 2 + [(0, None, 8)]
    assert nodes[0].labels == {"role": "learner"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nodes: [{gpu: 4}]", "a node must have the keys count, gpus, .*, got gpu$"),
        ("nodes: [{gpus: 4}]", "nodes.gpu_gb must be set where gpus are"),
        ("nodes: [{cpus: -1}]", "nodes.cpus must be a number that is not negative, got -1"),
        ("machines: []", "must have a list `nodes`"),
        ("{", "must be YAML"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, text, expected):
    path = tmp_path / "nodes.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        described(str(path))


def test_the_cluster_that_ships():
    """Its nodes as many as it may grow to; the GPUs' memory follows from the instances."""
    hardware = described(RAY_CLUSTER)
    kinds = {}
    for node in hardware.nodes:
        kinds.setdefault(node.labels["role"], []).append((node.cpus, node.gpus, node.gpu_bytes))
    assert kinds == {
        "head": [(8, 0, None)],
        "rollout": [(4, 1, 48 * GB)] * 4,
        "reward": [(4, 1, 48 * GB)] * 2,
        "learner": [(48, 4, 48 * GB)],
    }


def test_this_machine():
    hardware = this_machine()
    (node,) = hardware.nodes
    assert node.cpus == os.cpu_count()
    assert node.memory_bytes is not None
    assert 10**8 < node.object_store_bytes <= 0.3 * node.memory_bytes
