import pytest

from cluster.checks import check_run
from cluster.config import ConfigError, RunConfig, validate

_RULES = """
def length(prompts, completions): return [0.0] * len(prompts)
def write(directory, *, seed): pass
"""


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
    (tmp_path / "rules_for_checks.py").write_text(_RULES)
    return {
        "run": {"dir": "runs/x", "num_steps": 2},
        "policy": {"model": {"architecture": {"model_type": "gpt2"}, "tokenizer": {"characters": "ab"}}},
        "prompts": {"path": "prompts.jsonl"},
        "reward": {"components": {"length": {"function": "rules_for_checks:length"}}},
    }


def _check(raw):
    check_run(validate(RunConfig, raw, where="test"))


def test_a_good_configuration_passes(raw):
    _check(raw)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"policy": {"model": "nowhere"}}, "policy.model must be an existing model directory or a hub name"),
        ({"policy": {"model": "."}}, "policy.model must be a model directory with a config.json, got '.'"),
        ({"policy": {"model": {"architecture": {}, "tokenizer": {"characters": "a"}}}}, "model_type must be set"),
        ({"prompts": {"path": "missing.jsonl"}}, "prompts.path must be an existing file or directory"),
        ({"prompts": {"make": {"function": "no_such_module:f"}}}, "there is no 'no_such_module'"),
        ({"evaluation": {"prompts": {"path": "missing"}}}, "evaluation.prompts.path must be an existing"),
        ({"reward": {"components": {"rm": {"model": "missing_dir"}}}}, "reward.components.rm.model must be"),
        ({"reward": {"components": {"f": {"function": "a.b.c:d"}}}}, "reward.components.f.function must name"),
        (
            {"reward": {"components": {"f": {"function": "rules_for_checks:lenght"}}}},
            "must name a function of rules_for_checks, and there is no 'lenght'; it has length",
        ),
        (
            {"prompts": {"make": {"function": "rules_for_checks:write", "arguments": {"sed": 3}}}},
            "prompts.make.arguments.sed is not an argument; write has seed",
        ),
        ({"run": {"dir": "s4://bucket/x", "num_steps": 1}}, "that fsspec knows, such as s3://bucket/runs/x"),
        ({"run": {"dir": "sftp://u:secret@host/x", "num_steps": 1}}, "run.dir must hold no password"),
        ({"run": {"dir": "memory://x", "num_steps": 1}}, "run.dir must be where all processes see it"),
        ({"run": {"dir": "wandb://x", "num_steps": 1}}, "needs wandbfs; pip install wandbfs"),
        ({"run": {"dir": "prompts.jsonl", "num_steps": 1}}, "run.dir must be a directory"),
    ],
)
def test_what_does_not_exist_is_named(raw, change, expected):
    with pytest.raises(ConfigError) as caught:
        _check(raw | change)
    assert expected in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_start_that_does_not_exist_or_validate(raw, tmp_path):
    raw["policy"] |= {"start": {"config": "sft.yaml"}}
    with pytest.raises(ConfigError, match=r"policy\.start\.config must be a YAML file"):
        _check(raw)
    (tmp_path / "sft.yaml").write_text("output: runs/sft\ndata: {path: walks.jsonl}\ntraining: {epoch: 3}\n")
    with pytest.raises(ConfigError, match=r"training\.epoch is not a setting; did you mean 'epochs'"):
        _check(raw)


def test_a_job_needs_an_absolute_run_directory(raw, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ConfigError, match=r"run\.dir must be absolute in a Ray job"):
        _check(raw)
