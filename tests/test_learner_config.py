"""Limits of the learner's settings."""

import pytest

from learner.config import OptimizerConfig


@pytest.mark.parametrize("betas", [[1.0, 0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, 1.5], [0.9, float("nan")]])
def test_decay_rates_are_at_least_0_and_below_1(betas: list[float]) -> None:
    with pytest.raises(ValueError, match="betas"):
        OptimizerConfig.model_validate({"betas": betas})


def test_decay_rates_may_be_0() -> None:
    assert OptimizerConfig.model_validate({"betas": [0.0, 0.999]}).betas == (0.0, 0.999)
