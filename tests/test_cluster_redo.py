"""The redo log gives back, to the bit, what the learner saw, and nothing that has become untrue."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.schema import check
from cluster.pipeline import Batch
from cluster.redo import RedoError, RedoLog
from cluster.storage import RunStorage
from reward.samples import samples_of
from reward.schema import SAMPLES, SCORED

GROUPS = {"0/b": 3, "0/c": 1, "1/b": 2}
AFTER = {"prompts": {"epoch": 1, "rows": [3, 1]}, "quarantined": {"0/a": "generate: too long"}}


def scored(group, num_samples, *, seed=0, reference=True):
    """Rows of one group, with floats that a decimal detour would change."""
    generator = np.random.default_rng([seed, *group.encode()])
    rows = []
    for index in range(num_samples):
        length = int(generator.integers(1, 9))
        logprobs = generator.normal(-1, 1, (2, length)).astype(np.float32)
        rows.append(
            {
                "prompt_id": group.partition("/")[2],
                "prompt": "q",
                "prompt_ids": [1, 2],
                "extras": "{}",
                "run_id": "run",
                "incarnation": 0,
                "group_id": group,
                "sample_index": index,
                "lease_id": 7,
                "response_ids": list(range(length)),
                "response_text": "x" * length,
                "logprobs": logprobs[0].tolist(),
                "policy_versions": [4] * (length - 1) + [5],
                "loss_mask": [position != 2 for position in range(length)],
                "finish_reason": "eos",
                "components": [("b", float(np.float32(0.1 * index))), ("a", -1.5)][: 1 + index % 2],
                "token_scores": None,
                "score_std": None,
                "reward_version": 0,
                "ref_logprobs": logprobs[1].tolist() if reference else None,
                "reference_version": 0,
            }
        )
    return pa.Table.from_pylist(rows, schema=SCORED)


def batch(step, *, seed=0, reference=True):
    tables = tuple(scored(group, count, seed=seed, reference=reference) for group, count in GROUPS.items())
    return Batch(
        step=step,
        group_ids=tuple(GROUPS),
        tables=tables,
        samples=pa.concat_tables([samples_of(table) for table in tables]),
        after=AFTER,
    )


def write(log, given):
    log.write(given, pa.concat_tables(given.tables))


@pytest.fixture
def storage(tmp_path):
    return RunStorage(str(tmp_path))


@pytest.mark.parametrize("reference", [True, False])
def test_a_batch_comes_back_to_the_bit(storage, reference):
    log, given = RedoLog(storage), batch(3, reference=reference)
    assert not log.has(3)
    write(log, given)
    found = log.read(3)
    assert (found.step, found.group_ids, found.after, found.quarantined) == (
        3,
        *(given.group_ids,),
        AFTER,
        AFTER["quarantined"],
    )
    assert [table.equals(again) for table, again in zip(found.tables, given.tables, strict=True)] == [True] * 3
    assert all(table.schema.equals(SCORED, check_metadata=True) for table in found.tables)
    assert check(found.samples, SAMPLES, "test").equals(given.samples)
    assert found.samples["kl"].null_count == (0 if reference else 6)


def test_samples_are_made_of_the_rows():
    table = scored("0/b", 3)
    columns = (table[name].to_pylist() for name in ("logprobs", "ref_logprobs", "loss_mask"))
    expected = [
        sum(our - their for our, their, is_own in zip(*row, strict=True) if is_own)
        for row in zip(*columns, strict=True)
    ]
    assert samples_of(table)["kl"].to_pylist() == pytest.approx(expected, abs=1e-6)
    index = table.schema.get_field_index("ref_logprobs")
    planted = table.set_column(index, SCORED.field("ref_logprobs"), table["logprobs"])
    assert samples_of(planted)["kl"].to_pylist() == [0.0, 0.0, 0.0]


def test_the_file_is_an_ordinary_table_of_scored_rows(storage):
    write(RedoLog(storage), batch(1))
    assert check(pq.read_table(storage.path("rollouts", "step-1.parquet")), SCORED, "test").num_rows == 6


def test_writing_a_step_forgets_the_later_ones(storage):
    log = RedoLog(storage)
    for step in (1, 2, 3, 4):
        write(log, batch(step))
    write(log, batch(2, seed=1))
    assert [log.has(step) for step in (1, 2, 3, 4)] == [True, True, False, False]
    assert log.read(2).tables[0].equals(batch(2, seed=1).tables[0])


def test_steps_behind_a_gap_are_forgotten_before_it_is_filled(storage):
    log = RedoLog(storage)
    write(log, batch(3))
    write(log, batch(2))
    assert not log.has(3), "it was sampled by the policy that another step 2 made"


@pytest.mark.parametrize("damage", ["missing", "short", "empty", "other"])
def test_a_file_that_cannot_be_read_is_named(storage, damage):
    log = RedoLog(storage)
    write(log, batch(5))
    path = storage.path("rollouts", "step-5.parquet")
    if damage == "missing":
        os.unlink(path)
    elif damage == "other":
        pq.write_table(pa.table({"a": [1]}), path)
    else:
        os.truncate(path, os.path.getsize(path) - 10 if damage == "short" else 0)
    with pytest.raises(
        RedoError, match=r"rollouts/step-5\.parquet must .*step 5.*continue the run with the same command"
    ):
        log.read(5)


def test_a_flipped_bit_is_found_or_harmless(storage):
    log = RedoLog(storage)
    write(log, batch(5))
    path = storage.path("rollouts", "step-5.parquet")
    with open(path, "rb") as file:
        whole = file.read()
    num_found = 0
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        with open(path, "wb") as file:
            file.write(damaged)
        try:
            found = log.read(5)
        except RedoError:
            num_found += 1
            continue
        assert found.after == AFTER, position
        assert [table.equals(again) for table, again in zip(found.tables, batch(5).tables, strict=True)] == [True] * 3
    assert num_found > 0.5 * len(range(0, len(whole), 7)), "most bytes are rows and what they mean"
