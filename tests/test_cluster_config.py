import os
import re
import subprocess
import sys
import time

import pytest
import yaml

from cluster.config import ConfigError, RunConfig, load, to_yaml, validate
from learner.presets import ONLINE

MINIMAL = {
    "run": {"dir": "runs/x", "num_steps": 2},
    "policy": {"model": "owner/model"},
    "prompts": {"path": "prompts.jsonl"},
    "reward": {"components": {"length": {"function": "rules:length"}}},
}


def _with(path, value):
    raw = {key: dict(section) for key, section in MINIMAL.items()}
    *sections, field = path.split(".")
    target = raw
    for section in sections:
        target = target.setdefault(section, {})
    target[field] = value
    return raw


def test_round_trip_through_yaml(tmp_path):
    config = validate(RunConfig, MINIMAL, where="test")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load(RunConfig, str(path)) == config


def test_overrides_and_references(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(validate(RunConfig, MINIMAL, where="test")))
    config = load(
        RunConfig, str(path), ["run.seed=7", "evaluation.seed=${run.seed}", "learner.optimizer.learning_rate=3e-4"]
    )
    assert (config.evaluation.seed, config.learner.optimizer.learning_rate) == (7, 3e-4)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("run.num_step", 3, "run.num_step is not a setting; did you mean 'num_steps'?"),
        ("rolouts.max_rows", 8, "rolouts is not a setting; did you mean 'rollouts'?"),
        ("run.num_steps", 0, "run.num_steps must be greater than or equal to 1, got 0"),
        ("run.num_steps", "many", "run.num_steps must be a valid integer, got 'many'"),
        ("rollouts.temperature", 0, "rollouts.temperature must be greater than 0, got 0"),
        ("learner.backend", "zerro", "learner.backend must be 'zero' or 'local', got 'zerro'"),
        ("learner.zero_stage", 4, "learner.zero_stage must be 0, 1, 2 or 3, got 4"),
        ("learner.optimizer.lr", 1e-3, "learner.optimizer.lr is not a setting; known keys: "),
        ("algorithm.kl.target", 6.0, "algorithm.kl: `target` and `horizon` must both be set with controller adaptive"),
        ("pipeline.max_staleness", -1, "pipeline.max_staleness must be greater than or equal to 0, got -1"),
        (
            "learner.num_minibatches",
            99,
            "learner.num_minibatches must be at most rollouts.prompts_per_step, got 99 > 8",
        ),
        ("prompts.make", {"function": "a:b"}, "prompts: exactly one of `path` and `make` must be set"),
        ("reward.components", {}, "reward.components must be"),
    ],
)
def test_mistakes_are_named_by_full_path(path, value, expected):
    with pytest.raises(ConfigError) as caught:
        validate(RunConfig, _with(path, value), where="config.yaml")
    assert expected in str(caught.value)
    assert str(caught.value).count("\n") == 0, "one mistake gives one line"


def test_missing_value_is_named():
    raw = {key: value for key, value in MINIMAL.items() if key != "policy"}
    with pytest.raises(ConfigError, match="policy must be set; it has no default"):
        validate(RunConfig, raw, where="config.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: [1, 2", "must be YAML"),
        ("- a\n- b", "must hold sections"),
        ("run: {dir: '${nowhere.x}'}", "nowhere"),
        ("run: {dir: '???'}", "Missing mandatory value: dir"),
    ],
)
def test_unreadable_files(tmp_path, text, expected):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load(RunConfig, str(path))


def test_command_line_reports_within_two_seconds_and_without_torch(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("run: {dir: runs/x, num_stepz: 2}\n")
    program = (
        "import sys; sys.argv = ['concord', 'train', sys.argv[1]]\n"
        "from cluster.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'torch', 'ray', 'deepspeed', 'transformers'} & set(sys.modules)))\n"
    )
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, cwd=os.getcwd(), check=False
    )
    assert time.perf_counter() - started < 2.0
    assert result.returncode == 2
    assert "run.num_stepz is not a setting; did you mean 'num_steps'?" in result.stderr
    assert "policy must be set" in result.stderr
    assert result.stdout.strip() == "[]"


def test_a_component_may_not_take_a_metrics_name():
    raw = _with("reward.components", {"score": {"function": "rules:f"}})
    with pytest.raises(ConfigError, match=r"reward: components must not be named \['score'\]"):
        validate(RunConfig, raw, where="config.yaml")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument 'CONFIG.yaml'"),
        (["plan", "missing.yaml"], "missing.yaml must be a YAML file, and there is none"),
        (["report", "."], "RUN_DIR must be the directory of a run"),
    ],
)
def test_wrong_use_is_one_message(arguments, expected):
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learner.optimizer.learning_rate=.inf", "learner.optimizer.learning_rate must be a finite number, got inf"),
        ("reward.components=[]", "a section must stay a section"),
    ],
)
def test_values_that_no_setting_can_have(tmp_path, override, expected):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(validate(RunConfig, MINIMAL, where="test")))
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load(RunConfig, str(path), [override])


# What the algorithm asks of other sections.

ALONE = {"samples_per_prompt": 1}


def _sections(**sections):
    return {**MINIMAL, **sections}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        *(
            (
                {"algorithm": name, "rollouts": ALONE},
                f"rollouts.samples_per_prompt must be at least 2 with algorithm {name}",
            )
            for name in ("rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce_plus_plus_baseline")
        ),
        (
            {"algorithm": {"name": "reinforce", "dynamic_sampling": {}}, "rollouts": ALONE},
            "rollouts.samples_per_prompt must be at least 2 with algorithm reinforce",
        ),
        (
            {"algorithm": "rloo", "learner": {"critic": "separate"}},
            "learner.critic must be left out with algorithm rloo, which has no value function, got separate",
        ),
        (
            {"algorithm": "a2c", "learner": {"epochs": 2}},
            "learner.epochs must be 1 with algorithm.policy_loss policy_gradient, which may use a sample once, got 2",
        ),
        (
            {
                "algorithm": "grpo",
                "reward": {**MINIMAL["reward"], "credit": {"component": "length", "kind": "potential"}},
            },
            "reward.credit must be left out with algorithm grpo",
        ),
        (
            {"algorithm": {"name": "dapo", "dynamic_sampling": {"component": "lenght"}}},
            "algorithm.dynamic_sampling.component must be one of reward.components length, got 'lenght'",
        ),
        (
            {"algorithm": {"kl": {"controller": "adaptive", "target": 6.0, "horizon": 3}}},
            "algorithm.kl.horizon must be above a fifth of the",
        ),
        ({"algorithm": "grppo"}, "algorithm: name must be one of ppo, "),
        (
            {"algorithm": {"name": "rloo", "clip_rnage": 0.1}},
            "algorithm.clip_rnage is not a setting; did you mean 'clip_range'?",
        ),
        ({"algorithm": {"name": "rloo", "gae_lambda": 0.9}}, "algorithm: gae_lambda must be left out or 0.95, got 0.9"),
        ({"algorithm": 5}, "algorithm must be"),
        ({"algorithm": {"name": "grpo", "kl": {"estimator": "k1"}}}, "algorithm.kl: `estimator` must be k2 or k3"),
        ({"algorithm": {"reference": {"mode": "swap"}}}, "algorithm.reference: `every` must be set with mode swap"),
        ({"algorithm": {"reference": {"mode": "base"}}}, "learner.lora must be set with algorithm.reference.mode base"),
    ],
    ids=str,
)
def test_what_the_algorithm_does_not_get_is_named(sections, expected):
    with pytest.raises(ConfigError) as caught:
        validate(RunConfig, _sections(**sections), where="config.yaml")
    assert expected in str(caught.value)
    assert str(caught.value).count("\n") == 0, "one mistake gives one line"


@pytest.mark.parametrize(
    "sections",
    [
        *({"algorithm": name} for name in ONLINE),
        {"algorithm": "reinforce", "rollouts": ALONE},
        {"algorithm": "ppo", "rollouts": ALONE, "learner": {"critic": "separate", "epochs": 4}},
        {"algorithm": "a2c", "learner": {"num_minibatches": 2}},
        {"algorithm": {"name": "dapo", "dynamic_sampling": {"component": "length"}}},
        {
            "algorithm": "reinforce",
            "reward": {**MINIMAL["reward"], "credit": {"component": "length", "kind": "potential"}},
        },
    ],
    ids=str,
)
def test_what_fits_together_runs_and_round_trips_through_yaml(sections, tmp_path):
    config = validate(RunConfig, _sections(**sections), where="test")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load(RunConfig, str(path)) == config


@pytest.mark.parametrize("written", ["rloo", {"name": "rloo"}], ids=str)
def test_an_override_of_one_setting_keeps_the_preset(tmp_path, written):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(_sections(algorithm=written)))
    config = load(RunConfig, str(path), ["algorithm.clip_range=0.1", "algorithm.kl.coef=0.2"]).algorithm
    assert (config.name, config.advantage, config.clip_range, config.kl.coef) == ("rloo", "leave_one_out", 0.1, 0.2)
    assert load(RunConfig, str(path), ["algorithm.name=grpo"]).algorithm.advantage == "group"
    assert load(RunConfig, str(path), ["algorithm=grpo"]).algorithm.advantage == "group"
