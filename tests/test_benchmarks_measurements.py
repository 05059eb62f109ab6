"""What the benchmarks of overlap, staleness and memory compute from their measurements, on numbers worked by hand."""

import asyncio
import os
import threading
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from actors.schema import PROMPTS, to_stream
from benchmarks.overlap import (
    MAX_LENGTH,
    MEAN_LENGTH,
    SAMPLES_PER_PROMPT,
    Stages,
    balanced_length,
    configuration,
    forced_lengths,
    groups_of,
    summary,
)
from benchmarks.processes import kind_of, memory_of, pin
from benchmarks.scale_stubs import StubRolloutWorker
from benchmarks.soak import SETTLED_AFTER, growth
from benchmarks.staleness import outcome


def test_lengths_depend_on_the_groups_seed_alone_and_have_a_long_tail():
    lengths = np.concatenate([forced_lengths(seed, SAMPLES_PER_PROMPT) for seed in range(500)])
    assert forced_lengths(7, 4) == forced_lengths(7, 4) != forced_lengths(8, 4)
    assert lengths.min() >= 1
    assert lengths.max() == MAX_LENGTH
    assert np.mean(lengths) == pytest.approx(MEAN_LENGTH, rel=0.05)
    assert np.mean(lengths > 2 * MEAN_LENGTH) > 0.05


def test_every_step_has_prompts_of_its_length_in_order(tmp_path):
    config = configuration(str(tmp_path / "a"), [3, 5], rollouts={"max_rows": 8})
    prompts = pa.parquet.read_table(config.prompts.path)["prompt"].to_pylist()
    count = config.rollouts.prompts_per_step
    assert [len(prompt) for prompt in prompts] == [3] * count + [5] * count
    assert (config.run.num_steps, config.rollouts.max_rows) == (2, 8)


def test_groups_are_generated_again_once_each():
    def table(group):
        return pa.table({"group_id": [group] * 3, "sample_index": [0, 1, 2]})

    rounds = [pa.concat_tables([table("a"), table("b")]), table("c")]
    assert [group["group_id"].to_pylist() for group in groups_of(rounds)] == [["a"], ["b"], ["c"]]


def test_stages_meet_where_the_worked_example_says():
    known = {0: Stages(generate_s=1.0, learn_s=0.8), 100: Stages(generate_s=1.0, learn_s=1.3)}
    assert balanced_length(known) == 40


@pytest.mark.parametrize("learn_s", [(2.0, 2.5), (0.1, 0.11), (0.8, 0.8)])
def test_stages_that_never_meet_name_the_remedy(learn_s):
    known = {n: Stages(generate_s=1.0, learn_s=s) for n, s in zip((10, 100), learn_s, strict=True)}
    with pytest.raises(SystemExit, match="--rows"):
        balanced_length(known)


def test_the_ratios_are_those_of_the_slower_stage():
    figures = summary(Stages(generate_s=2.0, learn_s=1.9), {0: 4.2, 1: 2.2, 2: 2.1})
    assert (figures["overlap_ratio"], figures["staleness_2_ratio"]) == (1.1, 1.05)
    assert figures["speedup_over_sync"] == pytest.approx(1.909)
    assert figures["stage_ratio"] == pytest.approx(1.053)


def test_growth_is_the_slope_after_settling():
    curve = [*np.linspace(0, 400, SETTLED_AFTER), *(500 + 0.25 * np.arange(250))]
    found = growth(curve)
    assert (found.slope, found.robust) == pytest.approx((0.25, 0.25))
    assert (found.start_mb, found.end_mb) == (500.0, 562.25)


def test_one_late_jump_moves_the_robust_slope_less():
    found = growth([*[500.0] * (SETTLED_AFTER + 200), *[520.0] * 50])
    assert found.robust == 0.0 < found.slope


def test_a_soak_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="at least 54 steps, got 53"):
        growth([1.0] * 53)


def test_staleness_counts_tokens_alike_and_the_last_row_has_the_score():
    rows = [
        {"step": 0, "eval_optimality_mean": 0.3},
        {"step": 1, "num_tokens": 30, "staleness_mean": 0.0, "mismatch_ess": 1.0},
        {"step": 2, "num_tokens": 10, "staleness_mean": 2.0, "mismatch_ess": 0.5, "eval_optimality_mean": 0.9},
    ]
    found = outcome(rows)
    assert (found.optimality, found.mean_staleness, found.mismatch_ess) == (0.9, 0.5, 0.75)
    synchronous = [{key: value for key, value in row.items() if key != "staleness_mean"} for row in rows]
    assert outcome(synchronous).mean_staleness == 0.0


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("ray::_Rank.step_on", "learner"),
        ("ray::ForcedLengthRolloutWorker", "rollout"),
        ("ray::RewardWorker.score ", "reward"),
        ("ray::IDLE", None),
        ("python -m benchmarks.soak RolloutWorker", None),
    ],
)
def test_a_process_is_known_by_its_title(title, kind):
    assert kind_of(title) == kind


def test_memory_is_seen_where_it_is_held():
    before = memory_of(os.getpid())
    held = np.ones(64 * 2**20, dtype=np.uint8)
    after = memory_of(os.getpid())
    assert after.private - before.private == pytest.approx(held.nbytes / 1e6, abs=5)
    assert after.resident > after.private


def test_threads_that_are_there_already_are_pinned_too():
    available = os.sched_getaffinity(0)
    seen, asked, answered = [], threading.Event(), threading.Event()

    def report():
        answered.set()
        asked.wait()
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=report)
    thread.start()
    answered.wait()
    try:
        pin(os.getpid(), {min(available)})
        asked.set()
        thread.join()
    finally:
        pin(os.getpid(), available)
    assert seen == [{min(available)}]


def test_a_worker_that_sleeps_takes_prompts_as_the_pool_sends_them():
    rows = pa.table({"group_id": ["g", "g"]})
    prompt = pa.Table.from_pylist(
        [{"prompt_id": "a", "prompt": "a", "prompt_ids": [1], "extras": "{}"}], schema=PROMPTS
    )
    worker = StubRolloutWorker(rows=rows, seconds=0.0)
    table, numbers = asyncio.run(worker.generate(to_stream(prompt), SimpleNamespace(num_samples=2)))
    assert table.equals(rows)
    assert numbers["num_bytes"] == rows.nbytes
