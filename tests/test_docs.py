"""The generated page is up to date, its proofs exist, and the worked example of docs/extending.md runs."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.algorithms_page import PAGE, ROOT, read_results, render
from learner.algorithm_config import AlgorithmConfig
from learner.algorithms import estimator_of
from learner.estimators import Experience
from learner.presets import ONLINE, PRESETS
from tests.learner_toys import learner_config, learner_rank, parameters, toy_batch, toy_directory

BOUNDS = {"ppo": 0.97, "rloo": 0.97, "grpo": 0.97}
SEEDS = (1000, 1001)


def test_the_page_is_what_its_command_writes():
    assert PAGE.read_text(encoding="utf-8") == render(read_results())


def test_the_committed_results_hold_what_is_promised():
    results = read_results()
    assert set(SEEDS) <= set(results)
    for lines in results.values():
        assert set(lines) == set(PRESETS)
        check_results(lines)


def check_results(lines):
    for name, line in lines.items():
        if name in ONLINE:
            assert line["optimality"] >= BOUNDS.get(name, 0.95), name
        else:
            assert line["gap_closed"] >= 0.45, name
        assert line["optimality"] <= line["frontier_optimality"] + 3 * line["standard_error"], name
    assert sum(line["seconds"] for line in lines.values()) < 25 * 60


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rloo", {"optimality": 0.96}),
        ("cispo", {"optimality": 0.94}),
        ("dpo", {"gap_closed": 0.44}),
        ("ppo", {"frontier_optimality": 0.5}),
        ("ppo", {"seconds": 1500.0}),
    ],
)
def test_results_that_fall_short_are_caught(name, change):
    lines = {key: dict(line) for key, line in read_results()[SEEDS[0]].items()}
    lines[name] |= change
    with pytest.raises(AssertionError):
        check_results(lines)


@pytest.mark.parametrize("name", PRESETS)
def test_every_algorithm_has_a_check_and_a_planted_bug(name):
    file, check, bug = PRESETS[name].proof
    module = importlib.import_module(".".join(Path(file).with_suffix("").parts))
    found = {listed.id: listed for listed in module.CHECKS}
    assert bug in found[check].twins


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The file and the YAML line of docs/extending.md, in a directory where Python finds them."""
    blocks = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8").split("```")[1::2]
    (tmp_path / "my_algorithm.py").write_text(blocks[0].removeprefix("python\n"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield AlgorithmConfig.model_validate(yaml.safe_load(blocks[1].removeprefix("yaml\n"))["algorithm"])
    sys.modules.pop("my_algorithm", None)


def test_the_worked_example_gives_the_advantages_by_hand(example):
    experience = Experience(
        group_sizes=(3,),
        rewards=[torch.tensor([0.0, 1.0]), torch.tensor([0.25]), torch.tensor([0.0, 0.0])],
        values=[torch.zeros(3), torch.zeros(2), torch.zeros(3)],
        log_ratios=[torch.zeros(2), torch.zeros(1), torch.zeros(2)],
        baseline=0.0,
    )
    advantages = estimator_of(example)(experience, example).advantages
    assert [row.tolist() for row in advantages] == [[0.75, 0.75], [0.0], [-0.25, -0.25]]


def test_the_worked_example_trains(example, tmp_path):
    directory = toy_directory(tmp_path / "model")
    config = learner_config()
    learner = learner_rank(directory, config, algorithm=example)
    batch = toy_batch(directory, config, step=1)
    before = parameters(learner)
    metrics = learner.step(batch.tables, batch.plan)
    assert metrics["ratio_max"] > 1.0
    assert any(not torch.equal(before[name], now) for name, now in parameters(learner).items())
