"""C12: A2C is PPO with one epoch and one minibatch, to the last bit of every weight, through the real learner.

Source: Huang et al. 2022 (2205.09123), who showed it for Stable-Baselines3.
"""

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch

from learner.algorithm_config import AlgorithmConfig
from learner.learner import Skipped
from tests.checks import Case, Check, with_twins
from tests.learner_toys import learner_config, learner_rank, parameters, toy_batch, toy_directory

Backend = Literal["local", "zero"]
Old = Literal["auto", "recorded", "recomputed"]
Weights = dict[str, torch.Tensor]
Learn = Callable[[Backend], Weights]


@cache
def toy() -> str:
    """Return the directory of a tiny policy that lives as long as the process."""
    return toy_directory(Path(tempfile.mkdtemp(prefix="a2c-")))


@cache
def learnt(
    backend: Backend,
    algorithm: AlgorithmConfig,
    *,
    old: Old = "recomputed",
    epochs: int = 1,
    num_minibatches: int = 1,
    num_steps: int = 3,
) -> Weights:
    """Return the weights after some steps of several micro-batches each.

    Args:
        backend: Who updates the parameters.
        algorithm: What is learnt.
        old: Where the old log-probs come from.  Recorded ones were computed in rows of other shapes and, after the
            first step, under older weights; recomputed ones are the learner's own, to the last bit.
        epochs: Passes over each step's batch.
        num_minibatches: Updates per epoch.
        num_steps: Batches.
    """
    off_policy = algorithm.off_policy.model_copy(update={"old_logprobs": old})
    config = learner_config(backend=backend, epochs=epochs, num_minibatches=num_minibatches)
    rank = learner_rank(toy(), config, algorithm=algorithm.model_copy(update={"off_policy": off_policy}))
    for step in range(1, num_steps + 1):
        batch = toy_batch(toy(), config, step=step)
        assert not isinstance(rank.step(batch.tables, batch.plan), Skipped)
    return parameters(rank)


def a2c(**settings: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate({"name": "a2c", "entropy_coef": 0.01, **settings})


def ppo(**settings: Any) -> AlgorithmConfig:
    like_a2c = {"whiten_advantages": False, "value_clip_range": None, "entropy_coef": 0.01}
    return AlgorithmConfig.model_validate({"name": "ppo", **like_a2c, **settings})


def equals(learn: Learn, *, expected: Learn, backend: Backend = "local") -> None:
    actual, weights = learn(backend), expected(backend)
    assert actual.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(actual[name], weight), f"{name} differs by {float((actual[name] - weight).abs().max())}"


def by(algorithm: AlgorithmConfig, **settings: Any) -> Learn:
    return partial(learnt, algorithm=algorithm, **settings)


GAE: dict[str, Any] = {"gae_lambda": 0.9}
TD: dict[str, Any] = {"advantage": "n_step", "n_step": 1}
THREE_STEP: dict[str, Any] = {"advantage": "n_step", "n_step": 3}

CHECKS = (
    Check(
        id="C12-local",
        run=partial(equals, expected=by(a2c(**GAE))),
        part=by(ppo(**GAE)),
        twins={
            "two-epochs": by(ppo(**GAE), epochs=2),
            "two-minibatches": by(ppo(**GAE), num_minibatches=2),
            "whitened": by(ppo(**GAE, whiten_advantages=True)),
            "other-lambda": by(ppo(gae_lambda=0.95)),
            "ratio-to-the-sampling-policy": by(ppo(**GAE), old="recorded"),
        },
    ),
    Check(
        id="C12-zero",
        run=partial(equals, expected=by(a2c(**GAE)), backend="zero"),
        part=by(ppo(**GAE)),
        twins={"two-epochs": by(ppo(**GAE), epochs=2)},
    ),
    Check(
        id="C12-td-error",
        run=partial(equals, expected=by(a2c(**TD))),
        part=by(ppo(**TD)),
        twins={"three-steps": by(ppo(**THREE_STEP))},
    ),
    Check(
        id="C12-n-step",
        run=partial(equals, expected=by(a2c(**THREE_STEP))),
        part=by(ppo(**THREE_STEP)),
        twins={"td-error": by(ppo(**TD))},
    ),
    Check(
        id="C12-on-policy-by-default",
        run=partial(equals, expected=by(a2c(**GAE), old="auto", num_steps=1)),
        part=by(ppo(**GAE), old="auto", num_steps=1),
        twins={"ratio-but-for-rounding": by(ppo(**GAE), old="recorded", num_steps=1)},
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


def test_the_weights_have_moved() -> None:
    """Equal because nothing was learnt would be no proof."""
    start, end = learnt("local", a2c(**GAE), num_steps=0), learnt("local", a2c(**GAE))
    assert all(not torch.equal(start[name], weights) for name, weights in end.items())
