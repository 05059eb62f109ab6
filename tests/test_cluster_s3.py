"""A run in S3: a server that speaks its protocol, and Ray nodes each of which has a disk of its own."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from tests.job_cluster import ROOT
from tests.run_toys import tiny_config

SCRIPT = """
import json, os, shutil, sys
from pathlib import Path

import pyarrow.parquet as pq
import ray
from ray.cluster_utils import Cluster

from cluster.config import RunConfig, load
from cluster.export import export_policy
from cluster.loop import train, train_step
from cluster.report import build_report
from cluster.remote_storage import open_storage
from cluster.run import Run
from cluster.status import run_status
from tests.run_toys import metrics_of, weights_of

path, url, root = sys.argv[1], sys.argv[2], Path(sys.argv[3])


def joined(role, **options):
    # A node's processes inherit what is set when it is started: where its own disk is.
    os.environ["CONCORD_CACHE"] = str(root / f"disk-of-{role}")
    return {"num_cpus": 2, "labels": {"role": role}, **options}


def config(run_dir):
    return load(RunConfig, path, [f"run.dir={run_dir}"])


cluster = Cluster(initialize_head=True, head_node_args=joined("head", include_dashboard=False))
try:
    for role in ("learner", "reward", "rollout"):
        cluster.add_node(**joined(role))
    os.environ["CONCORD_CACHE"] = str(root / "disk-of-head")
    ray.init(address=cluster.address, namespace="concord")
    with Run(config(url)) as run:
        run.evaluate_start()
        for step in run.steps():
            train_step(run, step)
            if step == 3:  # after the checkpoint of step 2
                break
    for disk in root.glob("disk-of-*"):
        shutil.rmtree(disk)  # every machine is lost
    with Run(config(url)) as run:
        started = run.step
        train(run)
    seen = {disk.name: sorted({path.name for path in disk.glob("fetched/*/*/*")}) for disk in root.glob("disk-of-*")}
    staged = [found for disk in root.glob("disk-of-*") for found in (disk / "staging").glob("*/*")]
    left = [str(found) for found in staged if f"-{os.getpid()}-" not in str(found)]  # this process's go when it ends

    with Run(config(root / "straight")) as run:  # on a disk, and in one go
        train(run)

    status = run_status(url, now=0.0)
    report = build_report(url)
    exported = export_policy(url, str(root / "exported"))
    storage = open_storage(url)
    got = root / "got"
    for key in storage._store.keys():
        if key.startswith("policy/") or key == "metrics.parquet":
            (got / key).parent.mkdir(parents=True, exist_ok=True)
            storage._store.fetch(key, str(got / key))
finally:
    ray.shutdown()
    cluster.shutdown()

weights, expected = weights_of(got), weights_of(root / "straight")
from transformers import AutoModelForCausalLM

again = AutoModelForCausalLM.from_pretrained(exported).state_dict()
OWN = ["run_id", "incarnation", "lease_id"]
print("FOUND", json.dumps({
    "started": started,
    "same_metrics": metrics_of(got) == metrics_of(root / "straight"),
    "same_weights": len(weights) == len(expected) and all(weights[name].equal(expected[name]) for name in expected),
    "same_export": all(again[name].equal(expected[name]) for name in expected),
    "same_rows": [
        open_storage(url).read_table("rollouts", f"step-{step}.parquet").drop_columns(OWN)
        == pq.read_table(root / "straight" / "rollouts" / f"step-{step}.parquet").drop_columns(OWN)
        for step in (1, 2, 3, 4)
    ],
    "status": [status.step, status.checkpoint, status.is_conserved, status.process, status.directory],
    "report": report,
    "seen": seen,
    "left": left,
    "keys": sorted({key.split("/")[0] for key in storage._store.keys()}),
}))
"""


@pytest.fixture(scope="module")
def s3():
    """Yield the variables under which a bucket `runs` is found."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "very-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="runs")
    yield variables
    server.stop()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_in_s3_outlives_all_its_machines_and_changes_no_bit(s3, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in "abcdabcd"))
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("ab", "cd")))
    config = tiny_config(
        "replaced", tmp_path,
        evaluation={"prompts": {"path": str(tmp_path / "held_out.jsonl")}, "every": 2, "num_prompts": 2},
        learner={"num_ranks": 2},
        placement={"by_role": True},
    )  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    url = "s3://runs/of-tests/walks"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "train.yaml"), url, str(tmp_path)],
        cwd=ROOT, env=os.environ | s3, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "very-secret" not in output
    found = json.loads(done.stdout.rpartition("FOUND ")[2])
    assert found["started"] == 2
    assert found["same_metrics"], output
    assert found["same_weights"]
    assert found["same_export"]
    assert found["same_rows"] == [True] * 4
    assert found["status"] == [4, 4, True, None, url]
    assert found["report"] == f"{url}/report.html"
    shares = {f"learner-{rank:05d}-of-00002.safetensors" for rank in (1, 2)}
    assert shares < set(found["seen"]["disk-of-learner"]), "the ranks' host has got the checkpoint"
    assert not shares & set(found["seen"]["disk-of-head"]), "the driver's host never has"
    assert "model.safetensors" in found["seen"]["disk-of-rollout"]
    assert found["left"] == [], "what was on its way is gone"
    assert "owner.json" not in found["keys"], "nobody writes there any more"
    assert {"checkpoints", "config.yaml", "evaluation", "ledger.sqlite", "metrics.jsonl", "metrics.parquet", "policy",
            "report.html", "rollouts", "start", "summary.json", "tensorboard"} <= set(found["keys"])  # fmt: skip
