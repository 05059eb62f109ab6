"""The learning rate of every optimizer update: a pure function of its index, so that the driver can plan it."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from learner.config import OptimizerConfig


def learning_rate_at(update: int, total: int, config: "OptimizerConfig") -> float:
    """Return the learning rate of update `update` (from 0) of `total`.

    Warm-up runs at (update + 1) / warmup_steps of the peak, and decay reaches 0 only after the last update, so no
    update has rate 0.
    """
    if update < config.warmup_steps:
        return config.learning_rate * (update + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (update - config.warmup_steps) / max(1, total - config.warmup_steps)
    factor = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * max(factor, 0.0)
