"""Composition of components into scores: worked examples, running moments, and what must be refused."""

import json
import math
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.penalties import Penalties
from learner.shaping import RewardComposer, RunningMoments
from reward.config import ComponentConfig, ConstraintConfig, RewardConfig, WeightScheduleConfig
from reward.schema import SAMPLES

Row = tuple[str, int, dict[str, float | None], str]


def samples(rows: Sequence[Row]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "group_id": group_id,
                "sample_index": index,
                "num_prompt_tokens": 2,
                "num_response_tokens": 3,
                "num_loss_tokens": 3,
                "finish_reason": reason,
                "components": list(components.items()),
                "kl": 0.5,
                "oldest_version": 0,
                "newest_version": 0,
            }
            for group_id, index, components, reason in rows
        ],
        schema=SAMPLES,
    )


def judge(weight: float = 1.0, normalize: str = "none") -> ComponentConfig:
    return ComponentConfig(function="examples:judge", weight=weight, normalize=normalize)


ROWS: list[Row] = [
    ("0/b", 1, {"accuracy": 2.0, "style": -0.5}, "length"),
    ("0/a", 0, {"accuracy": 0.25}, "eos"),
    ("0/b", 0, {"style": 2.0}, "stop"),
    ("0/a", 1, {"accuracy": -3.0, "style": 1.0}, "length"),
]
NO_PENALTIES = Penalties()
TWO_JUDGES = {"accuracy": judge(), "style": judge(weight=0.2)}


def check_composition(composer_type: type[RewardComposer]) -> None:
    """By hand: 2 - .1 = 1.9 -> clip 1 -> .5;  .25;  .4;  -3 + .2 = -2.8 -> clip -1 -> -1.5."""
    composer = composer_type(RewardConfig(components=TWO_JUDGES, clip=1.0), Penalties(missing_eos=0.5))
    composed = composer.compose(samples(ROWS), step=1)
    assert composed.scores.dtype == np.float64
    np.testing.assert_allclose(composed.scores, [0.5, 0.25, 0.4, -1.5], atol=1e-7)


class _AbsentCountsAgainst(RewardComposer):
    def compose(self, table, *, step, update=True):
        rows = [
            (r["group_id"], r["sample_index"], dict(r["components"]), r["finish_reason"]) for r in table.to_pylist()
        ]
        filled = [(g, i, {"accuracy": -1.0, "style": -1.0, **c}, reason) for g, i, c, reason in rows]
        return super().compose(samples(filled), step=step, update=update)


class _PenaltyOnStop(RewardComposer):
    def compose(self, table, *, step, update=True):
        swapped = ["length" if reason != "length" else "eos" for reason in table["finish_reason"].to_pylist()]
        position = table.column_names.index("finish_reason")
        field = pa.field("finish_reason", pa.string(), nullable=False)
        return super().compose(table.set_column(position, field, pa.array(swapped)), step=step, update=update)


class _IdentityOrder(RewardComposer):
    def compose(self, table, *, step, update=True):
        ordered = table.sort_by([("group_id", "ascending"), ("sample_index", "ascending")])
        return super().compose(ordered, step=step, update=update)


def test_scores_are_weighted_clipped_and_penalised_in_row_order() -> None:
    check_composition(RewardComposer)


@pytest.mark.parametrize("twin", [_AbsentCountsAgainst, _PenaltyOnStop, _IdentityOrder])
def test_a_wrong_composition_is_caught(twin: type[RewardComposer]) -> None:
    with pytest.raises(AssertionError):
        check_composition(twin)


def test_absent_components_are_counted_and_left_out_of_the_moments() -> None:
    composed = RewardComposer(RewardConfig(components=TWO_JUDGES), NO_PENALTIES).compose(samples(ROWS), step=1)
    assert composed.num_absent == {"accuracy": 1, "style": 1}
    assert composed.means["accuracy"] == pytest.approx((2.0 + 0.25 - 3.0) / 3)
    assert composed.stds["style"] == pytest.approx(np.std([-0.5, 2.0, 1.0]))
    only = RewardComposer(RewardConfig(components=TWO_JUDGES), NO_PENALTIES).compose(
        samples([("0/a", 0, {"style": 1.0}, "eos")]), step=1
    )
    assert only.num_absent == {"accuracy": 1, "style": 0}
    assert math.isnan(only.means["accuracy"])
    assert math.isnan(only.stds["accuracy"])


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ({}, r"a sample must have at least one component, got none \(group '0/q', sample 3\)"),
        ({"accuracy": math.nan}, r"component 'accuracy' must be finite, got nan \(group '0/q', sample 3\)"),
        ({"style": math.inf, "accuracy": 1.0}, r"component 'style' must be finite, got inf \(group '0/q', sample 3\)"),
        ({"accuracy": None}, r"component 'accuracy' must be finite, got None \(group '0/q', sample 3\)"),
        (
            {"length": 1.0},
            r"a component must be one of \['accuracy', 'style'\], got 'length' \(group '0/q', sample 3\)",
        ),
    ],
)
def test_what_cannot_be_scored_is_named(components, message) -> None:
    composer = RewardComposer(RewardConfig(components=TWO_JUDGES), NO_PENALTIES)
    before = composer.state_dict()
    with pytest.raises(ValueError, match=message):
        composer.compose(samples([("0/q", 3, components, "eos")]), step=1)
    assert composer.state_dict() == before


NORMALIZED = RewardConfig(components={"accuracy": judge(2.0, "running"), "style": judge()})


def batch(values: Sequence[float], epoch: int = 0) -> pa.Table:
    return samples([(f"{epoch}/{i:03}", 0, {"accuracy": v, "style": 0.0}, "eos") for i, v in enumerate(values)])


Composers = Callable[[], RewardComposer]


def check_running_moments(make: Composers) -> None:
    """The batch counts before it is used, and so does every batch before it, with the population's deviation."""
    composer = make()
    first = composer.compose(batch([1.0, 3.0]), step=1).scores
    np.testing.assert_allclose(first, [-2.0, 2.0], rtol=1e-7)  # mean 2, std 1, weight 2
    second = composer.compose(batch([5.0, 7.0, -1.0], epoch=1), step=1).scores
    seen = np.array([1.0, 3.0, 5.0, 7.0, -1.0])
    np.testing.assert_allclose(second, 2 * (np.array([5.0, 7.0, -1.0]) - seen.mean()) / seen.std(), rtol=1e-7)


class _UsesBeforeUpdate(RewardComposer):
    def compose(self, table, *, step, update=True):
        composed = super().compose(table, step=step, update=False)
        super().compose(table, step=step, update=update)
        return composed


class _Forgets(RewardComposer):
    def compose(self, table, *, step, update=True):
        self._moments = {name: RunningMoments() for name in self._moments}
        return super().compose(table, step=step, update=update)


class _SampleDeviation(RewardComposer):
    def compose(self, table, *, step, update=True):
        composed = super().compose(table, step=step, update=update)
        count = self._moments["accuracy"].count
        object.__setattr__(composed, "scores", composed.scores * math.sqrt((count - 1) / count))
        return composed


def test_running_moments_take_the_batch_in_first() -> None:
    check_running_moments(lambda: RewardComposer(NORMALIZED, NO_PENALTIES))


@pytest.mark.parametrize("twin", [_UsesBeforeUpdate, _Forgets, _SampleDeviation])
def test_wrong_running_moments_are_caught(twin: type[RewardComposer]) -> None:
    with pytest.raises(AssertionError):
        check_running_moments(lambda: twin(NORMALIZED, NO_PENALTIES))


FLOATS = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=5))
def test_merging_batches_equals_all_values_at_once(batches: list[list[float]]) -> None:
    moments = RunningMoments()
    for values in batches:
        moments = moments.merged(np.array(values))
    everything = np.array([value for values in batches for value in values])
    assert moments.count == everything.size
    assert moments.mean == pytest.approx(everything.mean(), abs=1e-9)
    assert moments.squares / moments.count == pytest.approx(everything.var(), abs=1e-6, rel=1e-9)


def test_a_peek_remembers_nothing_and_uses_what_is_known() -> None:
    composer = RewardComposer(NORMALIZED, NO_PENALTIES)
    alone = composer.compose(batch([0.0, 10.0]), step=1, update=False).scores
    np.testing.assert_allclose(alone, [-2.0, 2.0], rtol=1e-7)  # nothing known yet: by the batch's own moments
    assert composer.state_dict() == {"accuracy": {"count": 0, "mean": 0.0, "squares": 0.0}}
    composer.compose(batch([1.0, 3.0]), step=1)
    state = composer.state_dict()
    np.testing.assert_allclose(composer.compose(batch([4.0]), step=1, update=False).scores, [4.0], rtol=1e-7)
    assert composer.state_dict() == state


def test_a_constant_component_normalises_to_zero() -> None:
    assert np.abs(RewardComposer(NORMALIZED, NO_PENALTIES).compose(batch([0.1] * 7), step=1).scores).max() < 1e-9


def test_order_of_arrival_leaves_the_bits_alone_and_state_goes_through_json() -> None:
    generator = np.random.default_rng(0)
    table = batch(generator.normal(size=33).astype(np.float32).tolist())
    one, other = RewardComposer(NORMALIZED, NO_PENALTIES), RewardComposer(NORMALIZED, NO_PENALTIES)
    order = generator.permutation(33)
    scores = one.compose(table, step=1).scores
    shuffled = other.compose(table.take(pa.array(order)), step=1).scores
    assert np.array_equal(scores[order], shuffled)
    assert one.state_dict() == other.state_dict()
    resumed = RewardComposer(NORMALIZED, NO_PENALTIES)
    resumed.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert resumed.state_dict() == one.state_dict()
    following = batch([1.0, 2.0], epoch=1)
    assert np.array_equal(resumed.compose(following, step=1).scores, one.compose(following, step=1).scores)


def test_the_state_of_other_components_is_refused() -> None:
    with pytest.raises(ValueError, match=r"running moments must be of \['accuracy'\], got \['style'\]"):
        RewardComposer(NORMALIZED, NO_PENALTIES).load_state_dict({"style": {"count": 1, "mean": 0.0, "squares": 0.0}})


SCHEDULED = RewardConfig(
    components={
        "accuracy": ComponentConfig(
            function="examples:judge",
            weight=1.0,
            schedule=WeightScheduleConfig(final_weight=0.2, start_step=2, end_step=6),
        ),
        "style": judge(),
    }
)


def check_schedule(composer_type: type[RewardComposer]) -> None:
    """From 1 in step 2 by -0.2 a step to 0.2 in step 6; a peek at another step does not move it."""
    composer = composer_type(SCHEDULED, NO_PENALTIES)
    table = samples([("0/a", 0, {"accuracy": 10.0, "style": 1.0}, "eos")])
    found = [float(composer.compose(table, step=step).scores[0]) for step in (0, 1, 2, 3, 4, 5, 6, 7)]
    np.testing.assert_allclose(found, [11.0, 11.0, 11.0, 9.0, 7.0, 5.0, 3.0, 3.0])
    np.testing.assert_allclose(composer.compose(table, step=3, update=False).scores, [9.0])


class _OneStepLate(RewardComposer):
    def compose(self, table, *, step, update=True):
        return super().compose(table, step=step - 1, update=update)


class _CountsCalls(RewardComposer):
    calls = -1

    def compose(self, table, *, step, update=True):
        self.calls += 1
        return super().compose(table, step=self.calls, update=update)


def test_a_scheduled_weight_moves_in_a_straight_line() -> None:
    check_schedule(RewardComposer)


@pytest.mark.parametrize("twin", [_OneStepLate, _CountsCalls])
def test_a_wrong_schedule_is_caught(twin: type[RewardComposer]) -> None:
    with pytest.raises(AssertionError):
        check_schedule(twin)


def cost(weight: float = 1.0) -> ComponentConfig:
    return ComponentConfig(function="examples:judge", role="cost", weight=weight)


WITH_COSTS = RewardConfig(
    components={"accuracy": judge(), "harm": cost(), "leak": cost(0.5)}, clip=1.0, constraint=ConstraintConfig()
)


def check_costs(composer_type: type[RewardComposer]) -> None:
    """Costs are summed apart, are not clipped, and are NaN only where none applies."""
    rows: list[Row] = [
        ("0/b", 0, {"accuracy": 0.5, "harm": 4.0, "leak": -2.0}, "eos"),
        ("0/a", 0, {"accuracy": 3.0, "leak": 8.0}, "length"),
        ("0/c", 0, {"accuracy": 0.25}, "eos"),
        ("0/d", 0, {"harm": 1.0}, "eos"),
    ]
    composed = composer_type(WITH_COSTS, Penalties(missing_eos=0.5)).compose(samples(rows), step=1)
    np.testing.assert_allclose(composed.scores, [0.5, 0.5, 0.25, 0.0], atol=1e-7)
    np.testing.assert_allclose(composed.costs, [3.0, 4.0, np.nan, 1.0], atol=1e-7)


class _CostsInTheScore(RewardComposer):
    def _weighted_sum(self, values, *, role, step):
        return sum(super(_CostsInTheScore, self)._weighted_sum(values, role=r, step=step) for r in ("reward", "cost"))


class _CostsInIdentityOrder(RewardComposer):
    def compose(self, table, *, step, update=True):
        composed = super().compose(table, step=step, update=update)
        order = np.lexsort((table["sample_index"].to_numpy(), table["group_id"].to_numpy(zero_copy_only=False)))
        object.__setattr__(composed, "costs", composed.costs[order])
        return composed


class _AbsentIsFree(RewardComposer):
    def _costs(self, components, *, step):
        return np.nan_to_num(super()._costs(components, step=step))


def test_costs_are_apart_from_scores() -> None:
    check_costs(RewardComposer)


@pytest.mark.parametrize("twin", [_CostsInTheScore, _CostsInIdentityOrder, _AbsentIsFree])
def test_costs_in_the_wrong_place_are_caught(twin: type[RewardComposer]) -> None:
    with pytest.raises(AssertionError):
        check_costs(twin)
