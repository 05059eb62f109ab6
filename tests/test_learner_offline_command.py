"""`concord offline` as a command: what is checked first, the supervised start, the files beside the model."""

import json
import os

import pyarrow.parquet as pq
import pytest

from actors.config import ArchitectureConfig, CharacterTokenizerConfig
from cluster import start
from cluster.config import ConfigError, load
from cluster.offline import run_offline
from learner.offline_config import OfflineConfig
from reward.schema import SCORED

ARCHITECTURE = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
MODEL = ArchitectureConfig(architecture=ARCHITECTURE, tokenizer=CharacterTokenizerConfig(characters="abcd"))


def _json_lines(path, rows) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def config_file(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    for name in ("MKL_CBWR", "OMP_WAIT_POLICY", "DS_ACCELERATOR"):  # the command sets them for good
        monkeypatch.setenv(name, os.environ.get(name, ""))
    completions = _json_lines(tmp_path / "completions.jsonl", [{"prompt": "a", "completion": "bc"}])
    sft = {"output": "x", "policy": {}, "data": {"path": completions}, "training": {"epochs": 2}}
    ratings = [{"prompt": "a", "completion": text, "rating": rating} for text, rating in (("b", 1.0), ("c", 0.0))]
    prompts = {"path": _json_lines(tmp_path / "prompts.jsonl", [{"prompt": "a", "id": "a"}])}
    judges = {"components": {"share": {"function": "tests.rules:share_of_a"}}}
    raw = {
        "output": str(tmp_path / "out"),
        "policy": {"model": MODEL.model_dump(), "start": {"config": str(tmp_path / "sft.yaml")}},
        "data": {"path": _json_lines(tmp_path / "ratings.jsonl", [*ratings, {"prompt": "a"}])},
        "algorithm": "dpo",
        "training": {"num_threads": 1},
        "evaluation": {"prompts": prompts, "reward": judges, "max_new_tokens": 3, "num_prompts": 1},
    }
    (tmp_path / "sft.yaml").write_text(json.dumps(sft))  # JSON is YAML
    path = tmp_path / "offline.yaml"
    path.write_text(json.dumps(raw))
    return str(path)


def test_the_command_learns_and_measures_from_a_start_that_is_trained_once(tmp_path, config_file, capsys):
    config = load(OfflineConfig, config_file)
    run_offline(config)
    said = capsys.readouterr().out
    assert "quarantined" in said
    assert "ratings.jsonl:3: rating must be a finite number, got None" in said
    assert "supervised start" in said
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["num_pairs"], metrics["data_score_mean"]) == (1, 0.5)
    assert {"share_mean", "score_mean", "kl", "implicit_accuracy"} <= set(metrics)
    rows = pq.read_table(tmp_path / "out" / "evaluation.parquet")
    assert rows.schema.equals(SCORED)
    assert load(OfflineConfig, str(tmp_path / "out" / "training.yaml")) == config
    (cached,) = (tmp_path / "cache" / "sft").glob("*/config.json")
    run_offline(load(OfflineConfig, config_file, ["algorithm=ilql"]))
    assert "supervised start" not in capsys.readouterr().out
    assert list((tmp_path / "cache" / "sft").glob("*/config.json")) == [cached]
    assert os.path.isfile(tmp_path / "out" / "value_heads.safetensors")


def test_a_training_run_finds_the_same_start(tmp_path, config_file, monkeypatch):
    config = load(OfflineConfig, config_file, ["evaluation=null"])
    trained = []

    def remember(sft, **arguments):
        trained.append(sft.output)
        os.makedirs(sft.output)
        raise StopIteration

    monkeypatch.setattr("learner.sft.train", remember)
    with pytest.raises(StopIteration):
        run_offline(config)
    found = start.prepare_policy(config.policy, seed=0, train=lambda sft: trained.append(sft.output))
    assert found == trained[0]
    assert trained[0] == trained[1]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.path=nowhere.jsonl", "data.path must be an existing file or directory, got 'nowhere.jsonl'"),
        ("evaluation.prompts.path=nowhere.jsonl", "evaluation.prompts.path must be an existing file"),
        ("evaluation.reward.components.share.function=tests.rules:shar", "evaluation.reward.components.share.function"),
        ("policy.start.config=nowhere.yaml", "policy.start.config must be a YAML file, got 'nowhere.yaml'"),
    ],
)
def test_mistakes_come_before_any_training(tmp_path, config_file, override, expected):
    with pytest.raises(ConfigError) as caught:
        run_offline(load(OfflineConfig, config_file, [override]))
    assert expected in str(caught.value)
    assert not os.path.exists(tmp_path / "cache")
