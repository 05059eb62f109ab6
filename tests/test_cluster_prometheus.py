"""What Prometheus reads of a real run, and whether it can answer every query of the dashboard."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request

import pyarrow.parquet as pq
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.grafana import dashboard
from cluster.loop import train
from cluster.registry import exported_names
from cluster.run import Run
from tests.run_toys import tiny_config
from tests.test_cluster_grafana import check_queries

pytestmark = pytest.mark.slow

LONGEST_REPORT_S = 60.0
"""Ray hands gauges on each 10 s."""


@pytest.fixture(scope="module")
def run_dir(ray_cluster, tmp_path_factory):
    """A run that generates ahead, so that there is staleness and mismatch, and evaluates."""
    data = tmp_path_factory.mktemp("data")
    for name, texts in (("prompts", "abcdabcd"), ("held_out", ["ab", "cd"])):
        rows = [json.dumps({"prompt": text, "id": f"{name}{number}"}) for number, text in enumerate(texts)]
        (data / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    held_out = {"prompts": {"path": str(data / "held_out.jsonl")}, "every": 2, "num_prompts": 2}
    directory = tmp_path_factory.mktemp("runs") / "watched"
    config = tiny_config(directory, data, evaluation=held_out, pipeline={"max_staleness": 1})
    with Run(config) as run:
        train(run)
    return directory


@pytest.fixture(scope="module")
def address(ray_cluster):
    node = ray_cluster.nodes()[0]
    return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"


@pytest.fixture(scope="module")
def exported(run_dir, address):
    """Name and tags -> value, of everything that the run has on Ray's metrics port."""
    deadline = time.monotonic() + LONGEST_REPORT_S
    while True:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        samples = [sample for family in families for sample in family.samples]
        ours = [sample for sample in samples if sample.labels.get("run") == run_dir.name]
        if any(sample.name == "ray_concord_step" and sample.value == 4 for sample in ours):
            return ours
        assert time.monotonic() < deadline, "the run's last step must be on the metrics port"
        time.sleep(1.0)


def _value(exported, name, **tags):
    (found,) = [s.value for s in exported if s.name == f"ray_concord_{name}" and tags.items() <= s.labels.items()]
    return found


def _newest(run_dir):
    """Return the newest value of each of the run's figures."""
    rows = pq.read_table(run_dir / "metrics.parquet").to_pylist()
    return {name: value for row in rows for name, value in row.items() if value is not None}


def test_prometheus_reads_every_figure_of_the_last_step(run_dir, exported):
    newest = _newest(run_dir)
    assert _value(exported, "score_mean", split="training") == pytest.approx(newest["score_mean"])
    assert _value(exported, "score_mean", split="held_out") == pytest.approx(newest["eval_score_mean"])
    assert _value(exported, "component_mean", component="share", split="training") == pytest.approx(
        newest["share_mean"]
    )
    assert _value(exported, "groups", state="trained") == 16
    assert _value(exported, "idle_share", role="rollout", reason="learner") == pytest.approx(
        newest["idle_rollout_learner"]
    )
    assert _value(exported, "process_kv_bytes", role="rollout", index="0") > 0
    figures = [name for name in newest if not name.startswith("timeline_")]
    seen = {sample.name for sample in exported}
    missing = exported_names(figures, ["share"]).keys() - seen
    assert missing == set()
    assert not any("timeline" in name for name in seen)


def _names(exported):
    names = {}
    for sample in exported:
        names.setdefault(sample.name, set()).update(sample.labels)
    return names


def test_every_query_of_the_dashboard_names_what_is_on_the_port(exported):
    check_queries(dashboard(), _names(exported))


def test_a_metric_that_is_renamed_is_caught(exported):
    """Planted bug: the learner calls its entropy something else from now on."""
    names = {name.replace("_entropy", "_entropy_mean"): tags for name, tags in _names(exported).items()}
    with pytest.raises(AssertionError, match="Entropy asks for ray_concord_entropy, which is not exported"):
        check_queries(dashboard(), names)


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def prometheus(exported, address, tmp_path_factory):
    """A real Prometheus that reads the metrics port; returns a function query -> results."""
    directory, port = tmp_path_factory.mktemp("prometheus"), _free_port()
    scrape = {"job_name": "ray", "scrape_interval": "1s", "static_configs": [{"targets": [address]}]}
    (directory / "prometheus.yml").write_text(json.dumps({"scrape_configs": [scrape]}))
    command = [
        shutil.which("prometheus"), f"--config.file={directory}/prometheus.yml",
        f"--storage.tsdb.path={directory}/data", f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip

    def ask(query):
        url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.load(answer)["data"]["result"]

    with open(directory / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "GOMAXPROCS": "1"})
    try:
        _wait_for(lambda: ask("ray_concord_step"), process)
        yield ask
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_for(ask, process):
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, "prometheus has ended"
        assert time.monotonic() < deadline
        try:
            if ask():
                return
        except OSError:
            pass  # it does not listen yet
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs the program prometheus (a Debian package)")
def test_a_real_prometheus_answers_every_query(run_dir, prometheus):
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"].replace("$run", run_dir.name)
            assert prometheus(query), f"{panel['title']} shows nothing: {query}"
    query = dashboard()["templating"]["list"][1]["query"]["query"]
    assert query == "label_values(ray_concord_step, run)"
    assert [found["metric"]["run"] for found in prometheus("ray_concord_step")] == [run_dir.name]
