import json

import pyarrow.parquet as pq

from cluster.metrics import Recorder
from cluster.storage import RunStorage
from cluster.trackers import Trackers


def test_rows_go_to_journal_and_table_and_survive_a_resume(tmp_path):
    storage = RunStorage(str(tmp_path))
    recorder = Recorder(storage, last_step=0, trackers=Trackers())
    recorder.record(0, {"policy_version": 0, "eval_kl": 0.0})
    recorder.record(1, {"policy_version": 1, "score_mean": 0.5, "kl": 0.25})
    recorder.record(2, {"policy_version": 2, "score_mean": 0.75, "kl": 0.5})
    recorder.close()
    table = pq.read_table(tmp_path / "metrics.parquet")
    assert table.column_names == ["step", "policy_version", "score_mean", "kl", "eval_kl"]
    assert table.to_pydict()["score_mean"] == [None, 0.5, 0.75]

    with open(tmp_path / "metrics.jsonl", "a") as journal:
        journal.write('{"step": 3, "sco')  # torn by a crash
    resumed = Recorder(storage, last_step=1, trackers=Trackers())
    resumed.record(2, {"policy_version": 2, "score_mean": 0.875, "kl": 0.5})
    resumed.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("score_mean")) for line in lines] == [(0, None), (1, 0.5), (2, 0.875)]
    assert pq.read_table(tmp_path / "metrics.parquet")["score_mean"].to_pylist() == [None, 0.5, 0.875]
