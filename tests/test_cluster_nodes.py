"""A run on four nodes, submitted from a shell that has the token only: one is removed in the middle, another joins."""

import json
import subprocess
import sys
import urllib.request
from contextlib import ExitStack

import pyarrow.parquet as pq
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.processes import read_processes
from tests.job_cluster import ROOT, job_cluster, wait_for

LOOK = """
import json, sys
import ray
from ray.util.state import list_actors

ray.init(address=sys.argv[1], log_to_driver=False)
nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
places = {
    actor.name.rpartition("/")[2]: nodes[actor.node_id]["Labels"].get("place", "head")
    for actor in list_actors(filters=[("state", "=", "ALIVE")], detail=True, limit=1000)
    if actor.name
}
ports = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes.values()]
print("SEEN", json.dumps([places, ports]))
"""

ROLES = ("rollout", "reward", "learner")


def look(cluster):
    """Return each named process of the run with its node's label `place`, and the nodes' metrics ports."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK, cluster.gcs_address],
        env=cluster.environment | {"RAY_AUTH_MODE": "token"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("SEEN ")[2])


def scraped(ports):
    """Return every sample on the metrics ports."""
    samples = []
    for port in ports:
        with urllib.request.urlopen(f"http://{port}/metrics", timeout=30) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            samples += [sample for family in families for sample in family.samples]
    return samples


def steps(directory):
    path = directory / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_walks_are_learnt_although_a_node_goes_and_on_one_that_comes(tmp_path):
    run_dir = tmp_path / "walks"
    on_roles = {"rollout_labels": "rollout", "reward_labels": "judge", "learner_labels": "judge"}
    settings = [
        f"run.dir={run_dir}", "rollouts.num_workers=2", "rollouts.max_workers=3",
        "placement.rollout_threads=1", "placement.reward_threads=1", "placement.learner_threads=1",
        *(f"placement.{name}={{role: {role}}}" for name, role in on_roles.items()),
    ]  # fmt: skip
    with job_cluster() as cluster, ExitStack() as nodes:
        nodes.enter_context(cluster.node("--labels=role=judge,place=judge"))
        nodes.enter_context(cluster.node("--labels=role=rollout,place=first"))
        doomed = ExitStack()
        nodes.push(doomed)
        doomed.enter_context(cluster.node("--labels=role=rollout,place=second"))
        command = [sys.executable, "-m", "cluster.cli", "submit", "examples/randomwalks.yaml", *settings, "--follow"]
        with open(tmp_path / "log", "w") as log:
            job = subprocess.Popen(
                [*command, "--address", cluster.address], cwd=ROOT, env=cluster.environment, stdout=log, stderr=log
            )
        try:
            wait_for(lambda: job.poll() is None and steps(run_dir) >= 3, 600)
            places, ports = look(cluster)
            roles = {role: sorted(places[name] for name in places if name.startswith(role)) for role in ROLES}
            assert roles == {"rollout": ["first", "second"], "reward": ["judge"], "learner": ["judge"]}, places
            wait_for(lambda: any(sample.name == "ray_concord_step" for sample in scraped(ports)), 60)
            doomed.close()
            gone = steps(run_dir)
            wait_for(lambda: steps(run_dir) >= gone + 3, 300)
            nodes.enter_context(cluster.node("--labels=role=rollout,place=third"))
            wait_for(lambda: "third" in look(cluster)[0].values(), 120)
            wait_for(lambda: any(p.name.startswith("rollout-2.") and p.does for p in read_processes(run_dir)), 120)
            assert job.wait(900) == 0, (tmp_path / "log").read_text()[-3000:]
        finally:
            job.kill()
    rows = pq.read_table(run_dir / "metrics.parquet").to_pylist()
    assert rows[-1]["eval_score_mean"] >= 0.95
    counts = json.loads((run_dir / "summary.json").read_text())["groups"]
    assert counts["accepted"] == counts["trained"] == 50 * 20
