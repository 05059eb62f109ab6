"""Learning rates by hand: no update at rate 0, decay that ends with the run."""

from collections.abc import Callable

import pytest

from learner.config import OptimizerConfig
from learner.schedule import learning_rate_at

Schedule = Callable[[int, int, OptimizerConfig], float]


def check_schedules(schedule: Schedule) -> None:
    expected = {
        ("constant", 0): [8.0] * 6,
        ("constant", 2): [4.0, 8.0, 8.0, 8.0, 8.0, 8.0],
        ("linear", 2): [4.0, 8.0, 8.0, 6.0, 4.0, 2.0],
        ("cosine", 2): [4.0, 8.0, 8.0, 6.8284271, 4.0, 1.1715729],
    }
    for (name, warmup), rates in expected.items():
        config = OptimizerConfig(learning_rate=8.0, schedule=name, warmup_steps=warmup)
        assert [schedule(update, 6, config) for update in range(6)] == pytest.approx(rates)


def test_learning_rates_by_hand() -> None:
    check_schedules(learning_rate_at)
    linear = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_steps=10)
    assert learning_rate_at(3, 5, linear) == pytest.approx(0.4)  # a run shorter than its warm-up
    assert all(learning_rate_at(update, 5, linear) > 0 for update in range(5))


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_schedule_one_update_off_is_caught(shift: int) -> None:
    with pytest.raises(AssertionError):
        check_schedules(lambda update, total, config: learning_rate_at(max(0, update + shift), total, config))
