"""What presets make of a learner rank: no value head without values, no forward passes for nothing, early stop."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.algorithm_config import AlgorithmConfig
from learner.config import LearnerConfig, OptimizerConfig
from learner.learner import LearnerRank
from learner.networks import Networks
from learner.presets import ONLINE
from tests.checks import Case, Check, with_twins
from tests.learner_toys import learner_config, learner_rank, parameters, toy_batch, toy_directory

ONE = learner_config(num_minibatches=1, epochs=1, microbatch_tokens=1000)
FOUR = learner_config(
    num_minibatches=2, epochs=2, microbatch_tokens=1000, optimizer=OptimizerConfig(learning_rate=5e-3)
)
CRITICLESS = tuple(name for name in ONLINE if not AlgorithmConfig.model_validate(name).needs_values)


@cache
def toy() -> str:
    """Return the directory of a tiny policy that lives as long as the process."""
    return toy_directory(Path(tempfile.mkdtemp(prefix="presets-")), tie_word_embeddings=True)


def algorithm(name: str, **settings: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate({"name": name, **settings})


def rank(of: AlgorithmConfig, config: LearnerConfig = ONE, **settings: Any) -> LearnerRank:
    return learner_rank(toy(), config, algorithm=of, **settings)


def step(learner: LearnerRank, config: LearnerConfig = ONE, number: int = 1) -> dict[str, float]:
    batch = toy_batch(toy(), config, step=number)
    metrics = learner.step(batch.tables, batch.plan)
    assert isinstance(metrics, dict), metrics
    return metrics


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Collect, of every forward pass, whether it makes a graph to learn from."""
    found: list[bool] = []
    shipped = Networks.forward

    def forward(self: Networks, row: Any, **settings: Any) -> Any:
        found.append(torch.is_grad_enabled())
        return shipped(self, row, **settings)

    monkeypatch.setattr(Networks, "forward", forward)
    return found


@pytest.mark.parametrize("name", ONLINE)
def test_only_what_is_needed_is_trained_and_computed(name, forwards) -> None:
    """Of 5 groups in one micro-batch: one forward, which values are taken from before it is learnt from."""
    learner = rank(algorithm(name))
    metrics = step(learner)
    has_values = name not in CRITICLESS
    assert any("value_head" in parameter for parameter in parameters(learner)) == has_values
    assert forwards == [True]
    of_values = {"value_loss", "value_explained_variance", "return_mean"}
    assert of_values & set(metrics) == (of_values if has_values else set())
    assert ("kl_loss" in metrics) == (algorithm(name).kl.placement == "loss")
    assert metrics["num_updates"] == 1.0
    assert metrics["ratio_max"] == 1.0, "the only update starts from the old policy, to the last bit"
    assert metrics["approx_kl"] == metrics["clip_fraction"] == 0.0
    assert metrics["grad_norm"] > 0


def test_the_names_of_presets_without_values() -> None:
    assert set(ONLINE) - set(CRITICLESS) == {"ppo", "a2c", "reinforce_value"}


@pytest.mark.parametrize(
    ("old", "dtype", "is_computed"),
    [
        ("auto", "float32", False),
        ("recorded", "float32", False),
        ("recomputed", "float32", True),
        ("auto", "bfloat16", True),
        ("recorded", "bfloat16", False),
    ],
)
def test_old_logprobs_are_recorded_or_computed(old, dtype, is_computed, forwards) -> None:
    """In bfloat16 what was recorded is another policy's: the ratio to it is not 1, to the computed ones it is."""
    apart = ONE.model_copy(update={"first_epoch_bytes": 0})
    learner = rank(algorithm("rloo", off_policy={"old_logprobs": old}), apart, dtype=dtype)
    metrics = step(learner)
    assert forwards == ([False] if is_computed else []) + [True]
    if dtype == "bfloat16":
        assert (metrics["ratio_max"] == pytest.approx(1.0, abs=1e-6)) == is_computed
        assert metrics["mismatch_p99"] > 1e-4
    else:
        assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-4)


# Early stop.


def stops(settings: dict[str, Any]) -> None:
    """Of four updates the second one has moved: it is made, and the two after it are not."""
    free = rank(algorithm("rloo"), FOUR)
    all_four = step(free, FOUR)
    assert all_four["num_updates"] == free.ping() == 4
    learner = rank(algorithm("rloo", **settings), FOUR)
    metrics = step(learner, FOUR)
    assert metrics["num_updates"] == learner.ping() == 2
    assert metrics["approx_kl"] > 1e-6
    assert metrics["approx_kl"] != all_four["approx_kl"]
    first, second = parameters(learner), parameters(free)
    assert not all(torch.equal(first[name], second[name]) for name in first)
    assert step(learner, FOUR, number=2)["num_updates"] >= 1, "the next step starts anew"


CHECKS = (
    Check(
        id="target-kl",
        run=stops,
        part={"target_kl": 1e-6},
        twins={"far-away": {"target_kl": 1e3}, "none": {"target_kl": None}},
    ),
)


@with_twins(CHECKS)
def test_early_stop(case: Case) -> None:
    case.verify()


def test_importance_weights_reach_the_gradient() -> None:
    """The recorded log-probs are far off: a mask on them leaves nothing to learn from, whatever the scores."""
    off_policy = {"old_logprobs": "recomputed", "mask": "token", "mask_range": [0.1, 0.2]}
    learner = rank(algorithm("rloo", off_policy=off_policy))
    before = parameters(learner)
    metrics = step(learner)
    assert metrics["policy_loss"] == 0.0
    assert metrics["grad_norm"] == 0.0
    weights = parameters(learner)
    assert max(float((weights[name] - before[name]).abs().max()) for name in before) < 1e-4


# Functions of one's own.

PLUGIN = """
import torch

from learner.estimators import Advantages
from learner.losses import policy_gradient


def last_reward(experience, algorithm):
    return Advantages(advantages=[row[-1].expand_as(row) for row in experience.rewards])


def td_zero(experience, algorithm):
    pairs = zip(experience.rewards, experience.values)
    advantages = [r + algorithm.gamma * v[1:] - v[:-1] for r, v in pairs]
    returns = [a + v[:-1] for a, v in zip(advantages, experience.values)]
    return Advantages(advantages=advantages, returns=returns)


def ascent(inputs, algorithm):
    return policy_gradient(inputs)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "preset_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "preset_plugin"


def same_weights(first: AlgorithmConfig, second: AlgorithmConfig) -> bool:
    found = []
    for one in (first, second):
        learner = rank(one)
        step(learner)
        found.append(parameters(learner))
    return found[0].keys() == found[1].keys() and all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_functions_of_ones_own_replace_built_in_ones(plugin) -> None:
    """A temporal difference and a policy gradient written outside learn what the built-in ones do, to the bit."""
    plain = {"whiten_advantages": False, "value_clip_range": None}
    own = {"advantage": f"{plugin}:td_zero", "policy_loss": f"{plugin}:ascent", **plain}
    assert same_weights(algorithm("ppo", **own), algorithm("a2c", advantage="n_step"))
    assert not same_weights(algorithm("ppo", **own), algorithm("a2c", advantage="n_step", n_step=3))


def test_an_estimator_of_ones_own_without_values(plugin) -> None:
    learner = rank(algorithm("ppo", advantage=f"{plugin}:last_reward", value_coef=0.0))
    assert not any("value_head" in name for name in parameters(learner))
    assert "value_loss" not in step(learner)


def test_an_estimator_without_value_targets_trains_no_values(plugin) -> None:
    """value_coef asks for values and the estimator gives them no targets: zeros would be learnt without a word."""
    learner = rank(algorithm("ppo", advantage=f"{plugin}:last_reward"))
    with pytest.raises(ValueError, match="value_coef"):
        step(learner)
