"""TensorBoard, MLflow and W&B for real, as far as they go without a network; and trackers that fail."""

import glob
import json
import math
import os
import re
import struct
import sys
import time

import pytest

from cluster.checks import check_run
from cluster.config import ConfigError, to_yaml
from cluster.metrics import Recorder
from cluster.storage import RunStorage
from cluster.trackers import MLflow, TensorBoard, Trackers, make_tracker
from tests.run_toys import minimal_config, tiny_config

_BLOCK = 2**15
ROWS = ((1, {"score_mean": 0.25, "kl": math.nan}), (2, {"score_mean": 0.5, "kl": 0.125, "timeline_started_at": 1e9}))


@pytest.fixture
def storage(tmp_path):
    return RunStorage(str(tmp_path / "walks"))


def follow(tracker, rows=ROWS):
    for step, values in rows:
        tracker.record(step, values, {"process_rollout_0_kv_bytes": 7.0})
    tracker.close()


def test_tensorboard_shows_each_figure_but_no_timeline(storage):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = storage.path("tensorboard", ".")
    follow(TensorBoard(directory, last_step=0))
    follow(TensorBoard(directory, last_step=1), [(2, {"score_mean": 0.75})])
    found = EventAccumulator(directory).Reload()
    assert [(event.step, event.value) for event in found.Scalars("score_mean")] == [(1, 0.25), (2, 0.75)]
    assert found.Scalars("kl") == [], "what came after the checkpoint is purged"
    assert set(found.Tags()["scalars"]) == {"score_mean", "kl"}


class Failing:
    def __init__(self):
        self.calls = []

    def record(self, step, values, processes):
        self.calls.append(step)
        raise ConnectionError("no route to\nhost")

    def close(self):
        self.calls.append("close")


def test_a_tracker_that_fails_is_left_out_and_the_journal_goes_on(storage):
    said, failing = [], Failing()
    trackers = Trackers([failing], say=said.append)
    recorder = Recorder(storage, last_step=0, trackers=trackers)
    for step in (1, 2):
        recorder.record(step, {"kl": 0.5})
    recorder.close()
    recorder.close()
    assert failing.calls == [1]
    assert trackers.num_failed == 1
    assert said == ["Failing is left out from now on, metrics.jsonl has everything: ConnectionError: no route to host"]
    assert [row["step"] for row in recorder.rows] == [1, 2]


def test_mlflow_has_every_step_and_goes_on_where_it_stopped(storage, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = minimal_config()
    follow(make_tracker("mlflow", config, storage), ROWS[:1])
    follow(make_tracker("mlflow", config, storage), ROWS[1:])
    run_id = json.loads(storage.read_text("trackers.json"))["mlflow"]
    client = MlflowClient(tracking_uri=MLflow.default_uri(storage))
    history = client.get_metric_history(run_id, "score_mean")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.25), (2, 0.5)]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "walks"
    assert set(run.data.metrics) == {"score_mean", "kl"}
    assert run.data.params["algorithm.name"] == config.algorithm.name


def test_wandb_writes_a_run_that_can_be_sent_later(storage, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    follow(make_tracker("wandb", minimal_config(), storage))
    run_id = json.loads(storage.read_text("trackers.json"))["wandb"]
    (written,) = glob.glob(os.path.join(storage.directory, "wandb", "offline-run-*", f"run-{run_id}.wandb"))
    from wandb.proto import wandb_internal_pb2

    def rows_of() -> list[dict[str, str]]:
        records = [wandb_internal_pb2.Record.FromString(content) for content in _log_records(written)]
        return [
            {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            for record in records
            if record.WhichOneof("record_type") == "history"
        ]

    deadline = time.monotonic() + 30
    while len(rows := rows_of()) < 2 and time.monotonic() < deadline:  # another process writes them
        time.sleep(0.2)
    assert [(row["step"], row["score_mean"]) for row in rows] == [("1", "0.25"), ("2", "0.5")]
    assert "kl" not in rows[0], "a figure that is no number is left out"
    assert "timeline_started_at" not in rows[1]


def _log_records(path):
    """Yield the records of a file in LevelDB's log format, behind W&B's own header of 7 bytes."""
    with open(path, "rb") as file:
        content = file.read()
    at, parts = 7, []
    while at + 7 <= len(content):
        if at % _BLOCK > _BLOCK - 7:  # a header never crosses the end of a block
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def test_a_service_that_cannot_be_had_is_one_error(storage, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(ConfigError, match=r"run.trackers must name services that can be reached, and mlflow cannot"):
        make_tracker("mlflow", minimal_config(), storage)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    return tiny_config(tmp_path / "run", tmp_path, run={"trackers": ["wandb", "mlflow"]})


@pytest.mark.parametrize("has_directory", [False, True])
def test_a_missing_package_is_named_before_anything_starts(config, tmp_path, monkeypatch, has_directory):
    """A directory that W&B has left in the working directory is no package."""
    hidden = [path for path in sys.path if not os.path.isdir(os.path.join(path, "wandb"))]
    monkeypatch.setattr("sys.path", [str(tmp_path), *hidden])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    if has_directory:
        (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    with pytest.raises(ConfigError) as raised:
        check_run(config)
    assert re.fullmatch(
        r"run.trackers must name installed packages, and wandb is not one; install it with `pip install "
        r"'concord-rlhf\[wandb\]'`, or leave it out",
        next(line for line in str(raised.value).splitlines() if "wandb" in line),
    )


def test_an_unknown_tracker_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match=r"run.trackers.0 must be 'wandb' or 'mlflow', got 'comet'"):
        tiny_config(tmp_path, tmp_path, run={"trackers": ["comet"]})


def test_a_run_may_go_on_with_other_trackers(config):
    from cluster.claim import learning_changes
    from cluster.config import RunConfig, validate

    other = validate(RunConfig, config.model_dump(mode="json") | {"run": {"dir": "x", "num_steps": 4}}, where="test")
    assert not any("trackers" in change for change in learning_changes(config, other))
    assert "trackers:\n  - wandb\n  - mlflow" in to_yaml(config)
