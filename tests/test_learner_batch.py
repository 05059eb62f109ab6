"""The plan of a step: every sample exactly once an epoch, one deal for all ranks, nothing that depends on arrival."""

import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.batch import Deal, Piece, StepContext, StepPlan, Update, identity_order, plan_step
from learner.config import LearnerConfig, OptimizerConfig
from reward.schema import SAMPLES

Group = tuple[int, tuple[int, ...]]
"""Prompt tokens, and the response tokens of each sample."""

CONTEXT = StepContext(step=3, num_steps=10, seed=17, kl_coef=0.05)


def samples(groups: dict[str, Group]) -> pa.Table:
    rows = [
        {
            "group_id": group_id,
            "sample_index": index,
            "num_prompt_tokens": prompt,
            "num_response_tokens": response,
            "num_loss_tokens": max(1, response - 1),
            "finish_reason": "eos",
            "components": [("accuracy", 1.0)],
            "kl": 0.5,
            "oldest_version": 0,
            "newest_version": 0,
        }
        for group_id, (prompt, responses) in groups.items()
        for index, response in enumerate(responses)
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def learner(**settings: object) -> LearnerConfig:
    return LearnerConfig(**{"microbatch_tokens": 16, **settings})


def plan(groups: dict[str, Group], config: LearnerConfig, context: StepContext = CONTEXT) -> StepPlan:
    table = samples(groups)
    return plan_step(table, np.arange(table.num_rows, dtype=np.float64), learner=config, context=context)


def pieces_of(deal: Deal) -> list[Piece]:
    return [piece for rank in deal for microbatch in rank for piece in microbatch]


def tokens_of(piece: Piece, groups: Sequence[Group]) -> int:
    prompt, responses = groups[piece.group]
    return prompt + sum(responses[index] for index in piece.samples)


def membership(plan: StepPlan) -> list[Counter[tuple[int, int]]]:
    """The samples of each update, whatever the deal."""
    return [
        Counter((piece.group, index) for piece in pieces_of(update.ranks) for index in piece.samples)
        for update in plan.updates
    ]


def check_plan(plan: StepPlan, groups: dict[str, Group], config: LearnerConfig) -> None:
    """Everything that must hold of any plan."""
    ordered = [groups[group_id] for group_id in sorted(groups)]
    everything = Counter((g, i) for g, (_, responses) in enumerate(ordered) for i in range(len(responses)))
    assert plan.group_ids == tuple(sorted(groups))
    assert plan.group_sizes == tuple(len(responses) for _, responses in ordered)
    by_update = membership(plan)
    assert len(by_update) == config.epochs * config.num_minibatches
    for epoch in range(config.epochs):
        of_epoch = by_update[epoch * config.num_minibatches : (epoch + 1) * config.num_minibatches]
        assert sum(of_epoch, Counter()) == everything
        groups_of = [{group for group, _ in update} for update in of_epoch]
        assert sum(len(one) for one in groups_of) == len(ordered)  # whole groups
        assert max(map(len, groups_of)) - min(map(len, groups_of)) <= 1
    for update, members in zip(plan.updates, by_update, strict=True):
        assert update.num_sequences == sum(members.values())
        assert update.num_tokens == sum(max(1, ordered[group][1][index] - 1) for group, index in members)
        check_deal(update.ranks, ordered, config)
    assert Counter((p.group, i) for p in pieces_of(plan.value_ranks) for i in p.samples) == everything
    check_deal(plan.value_ranks, ordered, config)


def check_deal(deal: Deal, groups: Sequence[Group], config: LearnerConfig) -> None:
    assert len(deal) == config.num_ranks
    assert len({len(rank) for rank in deal}) == 1
    for rank in deal:
        for microbatch in rank:
            tokens = sum(tokens_of(piece, groups) for piece in microbatch)
            alone = len(microbatch) == 1 and len(microbatch[0].samples) == 1
            assert tokens <= config.microbatch_tokens or alone
    for piece in pieces_of(deal):
        prompt, responses = groups[piece.group]
        fits = prompt + sum(responses) <= config.microbatch_tokens
        assert not fits or len(piece.samples) == len(responses)  # no prompt is computed twice without need


GROUPS = st.dictionaries(
    st.text("abc/01é", min_size=1, max_size=4),
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=80, deadline=None)
@given(GROUPS, st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(5, 30), st.randoms())
def test_any_plan_keeps_the_promises(groups, num_ranks, epochs, num_minibatches, budget, random) -> None:
    config = learner(
        num_ranks=num_ranks,
        epochs=epochs,
        num_minibatches=min(num_minibatches, len(groups)),
        microbatch_tokens=budget,
    )
    one = plan(groups, config)
    check_plan(one, groups, config)
    other_ranks = plan(groups, config.model_copy(update={"num_ranks": num_ranks + 1}))
    assert membership(other_ranks) == membership(one)
    assert Counter(pieces_of(other_ranks.value_ranks)) == Counter(pieces_of(one.value_ranks))
    table = samples(groups)
    order = list(range(table.num_rows))
    random.shuffle(order)
    shuffled = plan_step(table.take(pa.array(order)), np.array(order, dtype=float), learner=config, context=CONTEXT)
    assert pickle.dumps(shuffled) == pickle.dumps(one)


SIX = {f"0/{name}": (3, (5, 4)) for name in "fbdace"} | {"0/g": (6, (7, 8, 9))}
CONFIG = learner(num_ranks=2, num_minibatches=3, epochs=2)


def _edit(change: Callable[[Update], Update]) -> Callable[[StepPlan], StepPlan]:
    return lambda plan: replace(plan, updates=(change(plan.updates[0]), *plan.updates[1:]))


def _first_dropped(deal: Deal) -> Deal:
    return ((deal[0][0][1:], *deal[0][1:]), *deal[1:])


@pytest.mark.parametrize(
    "bug",
    [
        _edit(lambda update: replace(update, ranks=_first_dropped(update.ranks))),
        _edit(lambda update: replace(update, ranks=(update.ranks[0] + update.ranks[0][:1], *update.ranks[1:]))),
        _edit(lambda update: replace(update, ranks=((*update.ranks[0], ()), *update.ranks[1:]))),
        _edit(lambda update: replace(update, ranks=((sum(update.ranks[0], ()),), (sum(update.ranks[1], ()),)))),
        _edit(lambda update: replace(update, num_tokens=update.num_tokens + 1)),
        lambda plan: replace(plan, updates=plan.updates[:-1]),
        lambda plan: replace(plan, updates=plan.updates[:3] + plan.updates[:2] + plan.updates[5:]),
        lambda plan: replace(plan, value_ranks=_first_dropped(plan.value_ranks)),
    ],
    ids=["lost", "twice", "ranks out of step", "over budget", "wrong count", "update lost", "group lost", "no value"],
)
def test_a_broken_plan_is_caught(bug: Callable[[StepPlan], StepPlan]) -> None:
    good = plan(SIX, CONFIG)
    check_plan(good, SIX, CONFIG)
    with pytest.raises(AssertionError):
        check_plan(bug(good), SIX, CONFIG)


def test_the_worked_example_of_the_module() -> None:
    groups = {"a": (3, (2, 4)), "c": (3, (9, 8))}
    config = learner(num_ranks=2)
    (update,) = plan(groups, config).updates
    a, c0, c1 = Piece(group=0, samples=(0, 1)), Piece(group=1, samples=(0,)), Piece(group=1, samples=(1,))
    assert update.ranks == (((c0,), ()), ((c1,), (a,)))
    assert (update.num_sequences, update.num_tokens) == (4, 1 + 3 + 8 + 7)


def test_epochs_and_steps_and_seeds_shuffle_differently() -> None:
    groups = {f"0/{i:02}": (3, (5, 4)) for i in range(20)}
    config = learner(num_minibatches=4, epochs=2)

    def compositions(context: StepContext) -> list[list[int]]:
        return [sorted({group for group, _ in update}) for update in membership(plan(groups, config, context))]

    base = compositions(CONTEXT)
    assert base[:4] != base[4:]
    assert compositions(CONTEXT) == base
    for other in (replace(CONTEXT, step=4), replace(CONTEXT, seed=18), replace(CONTEXT, seed=-1)):
        assert compositions(other) != base


def test_the_shuffle_is_the_same_in_every_process_and_version() -> None:
    """Golden, for seed 17, step 3, epoch 0: a change would break the resume of every run."""
    groups = {f"0/{i}": (3, (5,)) for i in range(6)}
    members = [
        sorted({group for group, _ in update}) for update in membership(plan(groups, learner(num_minibatches=3)))
    ]
    assert members == [[1, 3], [2, 5], [0, 4]]


def test_learning_rates_follow_the_update_over_the_whole_run() -> None:
    optimizer = OptimizerConfig(learning_rate=1.0, schedule="linear")
    config = learner(optimizer=optimizer, epochs=2, num_minibatches=2)
    rates = [
        update.learning_rate
        for step in (1, 2)
        for update in plan(SIX, config, replace(CONTEXT, step=step, num_steps=2)).updates
    ]
    assert rates == pytest.approx([1 - k / 8 for k in range(8)])


def test_scores_follow_their_samples() -> None:
    table = samples({"0/b": (1, (1, 1)), "0/a": (1, (1, 1, 1))})
    reverse = table.take(pa.array(range(4, -1, -1)))
    planned = plan_step(reverse, np.array([2.0, 1.0, 0.0, 11.0, 10.0]), learner=learner(), context=CONTEXT)
    assert planned.group_ids == ("0/a", "0/b")
    assert planned.scores.tolist() == [0.0, 1.0, 2.0, 10.0, 11.0]
    assert planned.offsets == (0, 3)
    assert identity_order(reverse).tolist() == [2, 1, 0, 4, 3]


def test_a_plan_is_small_and_survives_pickling() -> None:
    groups = {f"0/{i:04}": (50, (60,) * 8) for i in range(256)}
    config = learner(num_ranks=8, num_minibatches=4, epochs=4, microbatch_tokens=4096)
    big = plan(groups, config)
    packed = pickle.dumps(big)
    assert len(packed) < 200_000
    copy = pickle.loads(packed)
    assert copy.updates == big.updates
    assert copy.value_ranks == big.value_ranks
    assert np.array_equal(copy.scores, big.scores)


def test_ranks_get_about_the_same_tokens() -> None:
    groups = {f"0/{i:02}": (4, (3 + i % 7, 9)) for i in range(24)}
    ordered = [groups[name] for name in sorted(groups)]
    (update,) = plan(groups, learner(num_ranks=3, microbatch_tokens=64)).updates
    loads = [sum(tokens_of(p, ordered) for microbatch in rank for p in microbatch) for rank in update.ranks]
    assert max(loads) / min(loads) < 1.1


def broken(**columns: list[int]) -> pa.Table:
    table = samples({"0/a": (3, (5, 4)), "0/b": (3, (5, 4))})
    for name, values in columns.items():
        field = table.schema.field(name)
        table = table.set_column(table.column_names.index(name), field, pa.array(values, field.type))
    return table


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        (broken(sample_index=[0, 2, 0, 1]), {}, r"0\.\.n-1, each once, got 2 where 1 is due \(group '0/a', sample 2\)"),
        (broken(sample_index=[0, 0, 0, 1]), {}, r"got 0 where 1 is due \(group '0/a', sample 0\)"),
        (broken(sample_index=[1, 2, 0, 1]), {}, r"got 1 where 0 is due \(group '0/a', sample 1\)"),
        (broken(num_prompt_tokens=[3, 3, 3, 4]), {}, r"share one prompt, got 4 and 3 prompt tokens \(group '0/b'"),
        (broken(num_loss_tokens=[1, 0, 1, 1]), {}, r"between 1 and num_response_tokens = 4, got 0 \(group '0/a', sam"),
        (broken(num_loss_tokens=[6, 1, 1, 1]), {}, r"between 1 and num_response_tokens = 5, got 6 \(group '0/a', sam"),
        (broken(), {"num_minibatches": 3}, r"at least learner.num_minibatches = 3 groups, got 2 \(step 3\)"),
    ],
)
def test_what_cannot_be_planned_is_named(table, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        plan_step(table, np.zeros(4), learner=learner(**settings), context=CONTEXT)


def test_scores_and_step_must_fit() -> None:
    with pytest.raises(ValueError, match=r"scores must have one entry for each of 4 samples, got shape \(3,\)"):
        plan_step(broken(), np.zeros(3), learner=learner(), context=CONTEXT)
    for step in (0, 11):
        with pytest.raises(ValueError, match=f"step must be between 1 and run.num_steps = 10, got {step}"):
            plan_step(broken(), np.zeros(4), learner=learner(), context=replace(CONTEXT, step=step))
