"""`concord offline`'s configuration: names and sections, errors by full path, the examples."""

from pathlib import Path

import pytest

from cluster.config import ConfigError, load, to_yaml, validate
from learner.offline_config import DPOConfig, OfflineConfig
from learner.presets import OFFLINE
from learner.value_config import ILQLConfig, QLearningConfig

ROOT = Path(__file__).parent.parent
MINIMAL = {"output": "out", "policy": {"model": "owner/model"}, "data": {"path": "data.jsonl"}}


def _validate(**sections) -> OfflineConfig:
    return validate(OfflineConfig, {**MINIMAL, **sections}, where="test")


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("dpo", DPOConfig()),
        ("ilql", ILQLConfig()),
        ({"name": "q_learning", "gamma": 0.5}, QLearningConfig(gamma=0.5)),
        ({"beta": 0.2}, DPOConfig(beta=0.2)),
    ],
)
def test_an_algorithm_is_a_name_or_a_section_and_survives_yaml(tmp_path, algorithm, expected):
    config = _validate(algorithm=algorithm)
    assert config.algorithm == expected
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load(OfflineConfig, str(path)) == config


def test_every_offline_preset_is_a_configuration():
    assert [_validate(algorithm=name).algorithm.name for name in OFFLINE] == list(OFFLINE)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"algorithm": "dpoo"}, "algorithm: name must be one of dpo, ilql, q_learning, got 'dpoo'"),
        ({"algorithm": "ppo"}, "`concord train` has the others"),
        ({"algorithm": 3}, "algorithm: an algorithm must be a name or a section, got 3"),
        ({"algorithm": {"beta": -1.0}}, "algorithm.beta must be greater than 0, got -1.0"),
        ({"algorithm": {"label_smoothing": 0.5}}, "algorithm.label_smoothing must be less than 0.5, got 0.5"),
        ({"algorithm": {"name": "ilql", "beta": 0.1}}, "algorithm.beta is not a setting"),
        ({"algorithm": {"name": "ilql", "tau": 1.0}}, "algorithm.tau must be less than 1, got 1.0"),
        ({"score": {"standardize": True}}, "score.standardize must be false with algorithm dpo"),
        ({"evaluation": {"num_prompts": 3}}, "evaluation.prompts must be set; it has no default"),
        ({"trainin": {}}, "trainin is not a setting; did you mean 'training'?"),
    ],
)
def test_mistakes_are_named_by_full_path(sections, expected):
    with pytest.raises(ConfigError) as caught:
        _validate(**sections)
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", ["dpo", "ilql", "q_learning"])
def test_the_example_uses_one_graph_everywhere(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    config = load(OfflineConfig, f"examples/randomwalks/{name}.yaml", ["data.make.arguments.seed=1004"])
    assert config.algorithm.name == name
    graphs = [
        config.policy.start.set["data"]["make"]["arguments"]["seed"],
        config.evaluation.prompts.make.arguments["seed"],
    ]
    assert graphs == [1004, 1004]
    assert config.output.endswith("1004")
