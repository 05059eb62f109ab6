"""Prompt data: order, resuming, quarantine."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actors import dataset, quarantine
from actors.architecture import character_tokenizer
from actors.config import FunctionConfig, PromptsConfig
from actors.encoding import PromptEncoder
from actors.prompts import PromptSource
from actors.schema import PROMPTS, check

ENCODER = PromptEncoder(character_tokenizer("abcdefghijklmnopqrstuvwxyz 0123456789"))

MALFORMED = {
    "missing field": (b'{"question": "a"}', "prompt must be there"),
    "wrong type": (b'{"prompt": 3}', "must be a string or a list of messages, got int"),
    "bad UTF-8": (b'{"prompt": "a\xff"}', "must be UTF-8, got byte 0xff"),
    "lone surrogate": (b'{"prompt": "a\\ud800"}', "must be valid Unicode"),
    "bad JSON": (b'{"prompt": "a"', "must be JSON"),
    "not an object": (b'["a"]', "must be a JSON object, got list"),
    "empty": (b'{"prompt": " "}', "must not be empty"),
    "no messages": (b'{"prompt": []}', "must not be empty"),
    "bad role": (b'{"prompt": [{"role": "king", "content": "a"}]}', "role must be one of"),
    "too long": (b'{"prompt": "' + b"a" * 13 + b'"}', "must have 1 to 12 tokens, got 13"),
    "wrong id": (b'{"prompt": "a", "id": 1.5}', "must be a non-empty string or an integer"),
    "unknown character": (b'{"prompt": "A"}', "alphabet"),
    "deep": (b'{"prompt": ' + b"[" * 100_000, "must be JSON"),
}


def write(path, lines: list[bytes]) -> str:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def good(number: int) -> bytes:
    return json.dumps({"prompt": f"q{number}", "id": number, "answer": number}).encode()


def source(path: str, *, seed: int = 0, **settings_: object) -> PromptSource:
    config = PromptsConfig(path=path, max_prompt_tokens=12, **settings_)
    return PromptSource(config, ENCODER, seed=seed, cache_dir="unused")


def names(drawn: list) -> list[tuple[int, str]]:
    return [(prompt.epoch, prompt.prompt_id) for prompt in drawn]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(dataset, "_LINES_PER_BLOCK", 4)


# -- rows ----------------------------------------------------------------------------


def test_a_row_becomes_a_row_of_prompts(tmp_path):
    path = write(tmp_path / "p.jsonl", [b'{"prompt": "abc", "prompt_id": "x", "answer": [1, null], "note": "hi"}'])
    [drawn] = source(path).draw(1)
    check(drawn.table, PROMPTS, "test")
    [row] = drawn.table.to_pylist()
    assert (row["prompt_id"], row["prompt"], row["prompt_ids"]) == ("x", "abc", [0, 1, 2])
    assert json.loads(row["extras"]) == {"answer": [1, None], "note": "hi"}


@pytest.mark.parametrize("kind", MALFORMED)
def test_each_malformed_kind_is_quarantined_with_file_and_line(tmp_path, kind):
    line, reason = MALFORMED[kind]
    path = write(tmp_path / "p.jsonl", [good(0), b"", line, good(1)])
    prompts = source(path)
    assert {name for _, name in names(prompts.draw(6))} == {"0", "1"}, "three epochs without the malformed row"
    [row] = prompts.quarantined
    assert (row.file, row.line) == (path, 3)
    assert reason in row.reason
    assert prompts.num_quarantined == 1
    with pytest.raises(ValueError, match=r"1 of 3 rows are malformed:\n.*p.jsonl:3: "):
        source(path, strict=True)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_second_row_with_an_id_is_malformed_in_every_epoch(tmp_path, shuffle):
    lines = [good(0), good(1), b'{"prompt": "other", "id": "1"}', *map(good, range(2, 9)), b'{"prompt": "z", "id": 0}']
    prompts = source(write(tmp_path / "p.jsonl", lines), shuffle=shuffle, shuffle_window=3)
    texts = {row["prompt"] for drawn in prompts.draw(27) for row in drawn.table.to_pylist()}
    assert texts == {f"q{number}" for number in range(9)}
    assert [row.line for row in prompts.quarantined] == [3, 11]
    assert prompts.quarantined[0].reason.endswith("p.jsonl:2")
    assert prompts.quarantined[1].reason.endswith("p.jsonl:1")
    assert prompts.num_quarantined == 2


def test_rows_without_id_are_named_by_content_and_occurrence(tmp_path):
    lines = [b'{"prompt": "a"}', b'{"prompt": "b"}', b'{"prompt": "a"}', b'{"prompt": "a", "k": 1}', b'{"prompt": "a"}']
    path = write(tmp_path / "p.jsonl", lines)
    first = [name for _, name in names(source(path, shuffle=False).draw(5))]
    assert len(set(first)) == 5
    assert first[2] == f"{first[0]}-1"
    assert first[4] == f"{first[0]}-2"
    later = [name for _, name in names(source(path).draw(10))][5:]
    assert sorted(later) == sorted(first), "the same names in any order and epoch"


def test_an_epoch_without_a_good_row_is_an_error(tmp_path):
    path = write(tmp_path / "p.jsonl", [line for line, _ in MALFORMED.values()])
    with pytest.raises(ValueError, match=rf"at least one good prompt; {len(MALFORMED)} of {len(MALFORMED)} rows"):
        source(path).draw(1)
    with pytest.raises(
        ValueError, match=r"p.jsonl must hold at least one good prompt; (.|\n)*p.jsonl:1: prompt must be"
    ):
        source(path).first(1)


def test_first_is_in_file_order_and_leaves_the_order_of_draws(tmp_path):
    path = write(tmp_path / "p.jsonl", [good(0), b"{", *map(good, range(1, 9))])
    prompts = source(path)
    assert names(prompts.first(3)) == [(0, "0"), (0, "1"), (0, "2")]
    assert len(prompts.first(99)) == 9
    assert names(prompts.draw(20)) == names(source(path).draw(20))
    assert prompts.num_quarantined == 1


# -- files ----------------------------------------------------------------------------


def test_parquet_jsonl_and_directories_give_the_same_rows(tmp_path):
    rows = [{"id": f"r{number}", "prompt": f"q{number}", "answer": number} for number in range(10)]
    pq.write_table(pa.Table.from_pylist(rows[:7]), tmp_path / "a.parquet", row_group_size=3)
    write(
        tmp_path / "b.jsonl",
        [b"\xef\xbb\xbf" + json.dumps(rows[7]).encode(), *(json.dumps(r).encode() for r in rows[8:])],
    )
    (tmp_path / "notes.txt").write_text("not data")
    prompts = source(str(tmp_path), shuffle=False)
    assert [name for _, name in names(prompts.draw(10))] == [row["id"] for row in rows]
    assert prompts.num_quarantined == 0
    assert [block.num_rows for block in prompts._dataset.blocks] == [3, 3, 1, 3]


def test_parquet_rows_that_cannot_be_read(tmp_path):
    encoded = [b"ok", b"\xff\xfe", b"", b"aaa"]
    offsets = np.cumsum([0] + [len(text) for text in encoded]).astype(np.int32)
    texts = pa.Array.from_buffers(pa.string(), 4, [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))])
    path = str(tmp_path / "p.parquet")
    pq.write_table(pa.table({"prompt": texts}), path, row_group_size=2)
    prompts = source(path, shuffle=False)
    assert [row["prompt"] for d in prompts.draw(2) for row in d.table.to_pylist()] == ["ok", "aaa"]
    assert [(row.line, row.reason.split(",")[0]) for row in prompts.quarantined] == [
        (2, "must be UTF-8"),
        (3, "prompt must not be empty"),
    ]


def test_parquet_messages_may_have_null_keys(tmp_path):
    messages = [{"role": "user", "content": "q", "name": None}]
    pq.write_table(pa.table({"prompt": [messages, [{**messages[0], "name": "x"}]]}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="chat template"):
        ENCODER.encode([{"role": "user", "content": "q"}])
    prompts = source(str(tmp_path / "p.parquet"))
    with pytest.raises(ValueError, match="2 of 2 rows are malformed"):
        prompts.first(2)
    reasons = [row.reason for row in prompts.quarantined]
    assert "chat template" in reasons[0], "a null key is no key, so only this tokenizer's missing template is wrong"
    assert "exactly `role` and `content`" in reasons[1]


def test_fsspec_url():
    import fsspec

    with fsspec.open("memory://data/p.jsonl", "wb") as file:
        file.write(b"\n".join(map(good, range(6))))
    prompts = source("memory://data/p.jsonl")
    assert sorted(name for _, name in names(prompts.draw(6))) == list("012345")


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "existing file or directory"), ("p.txt", "must end in"), ("empty.jsonl", "must have rows")],
)
def test_wrong_paths(tmp_path, name, message):
    (tmp_path / "p.txt").write_text("x")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=message):
        source(str(tmp_path / name))


CALLS = []


def make_prompts(directory: str, *, count: int) -> None:
    CALLS.append(count)
    with open(os.path.join(directory, "p.jsonl"), "wb") as file:
        file.write(b"\n".join(map(good, range(count))))


def test_a_make_function_runs_once_for_its_arguments(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "made_here", sys.modules[__name__])
    CALLS.clear()
    for count in (3, 3, 5):
        make = FunctionConfig(function="made_here:make_prompts", arguments={"count": count})
        config = PromptsConfig(make=make, max_prompt_tokens=12)
        assert PromptSource(config, ENCODER, seed=0, cache_dir=str(tmp_path)).num_rows == count
    assert CALLS == [3, 5]


# -- order and position ----------------------------------------------------------------------------


def test_epochs_are_permutations_and_follow_from_the_seed(tmp_path):
    path = write(tmp_path / "p.jsonl", [good(number) for number in range(23)])
    prompts = names(source(path, shuffle_window=5).draw(69))
    epochs = [[name for epoch, name in prompts if epoch == wanted] for wanted in range(3)]
    assert all(sorted(epoch, key=int) == [str(number) for number in range(23)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert prompts == names(source(path, shuffle_window=5).draw(69))
    assert prompts != names(source(path, shuffle_window=5, seed=1).draw(69))


def test_no_more_than_a_window_is_in_memory(tmp_path, monkeypatch):
    path = write(tmp_path / "p.jsonl", [good(number) for number in range(100)])
    prompts = source(path, shuffle_window=8)
    read = []
    rows = dataset.Dataset.rows

    def counted(self, block, skip=0):
        for row in rows(self, block, skip):
            read.append(row.ordinal)
            yield row

    monkeypatch.setattr(dataset.Dataset, "rows", counted)
    prompts.draw(1)
    assert len(read) == 8
    prompts.draw(8)
    assert len(read) == 16
    read.clear()
    resumed = source(path, shuffle_window=8)
    read.clear()
    resumed.seek({**prompts.position, "row": 50})
    resumed.draw(1)
    assert len(read) == 8, "a resume reads one window again, not the epoch"


LINES = st.lists(
    st.one_of(
        st.integers(0, 30).map(good), st.sampled_from([line for line, _ in MALFORMED.values() if len(line) < 99])
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, window=st.integers(1, 7), shuffle=st.booleans(), max_kept=st.sampled_from([2, 1000]))
def test_every_row_is_accepted_or_quarantined_and_every_position_resumes(
    tmp_path, monkeypatch, lines, window, shuffle, max_kept
):
    monkeypatch.setattr(quarantine, "MAX_KEPT", max_kept)
    path = write(tmp_path / "p.jsonl", [*lines, good(99)])
    options = {"shuffle": shuffle, "shuffle_window": window}
    prompts = source(path, **options)
    num_good = len(source(path, **options).first(99))
    total = 2 * num_good + 1
    straight, positions = [], []
    for _ in range(total):
        positions.append(json.loads(json.dumps(prompts.position)))
        straight += prompts.draw(1)
    positions.append(prompts.position)
    assert num_good + prompts.num_quarantined == len(lines) + 1
    assert len(prompts.quarantined) == min(max_kept, prompts.num_quarantined)
    assert [prompt.epoch for prompt in straight] == [0] * num_good + [1] * num_good + [2]
    for done, position in enumerate(positions[:-1]):
        resumed = source(path, **options)
        resumed.seek(position)
        assert resumed.num_quarantined == position["num_quarantined"]
        again = []
        for later in positions[done:-1]:
            assert resumed.position == later, "quarantined rows included"
            again += resumed.draw(1)
        assert names(again) == names(straight[done:])
        assert [prompt.table for prompt in again] == [prompt.table for prompt in straight[done:]]
        assert resumed.position == positions[-1]
        assert resumed.quarantined == prompts.quarantined
        assert resumed.num_quarantined == prompts.num_quarantined, "each malformed row counted once across a resume"


def test_a_resumed_source_names_the_rows_met_before(tmp_path, monkeypatch):
    path = write(tmp_path / "p.jsonl", [b"{", good(0), b"[]", good(1), b"3", good(2)])
    prompts = source(path, shuffle=False)
    prompts.draw(3)
    resumed = source(path, shuffle=False)
    resumed.seek(json.loads(json.dumps(prompts.position)))
    assert [(row.file, row.line) for row in resumed.quarantined] == [(path, 1), (path, 3), (path, 5)]
    assert resumed.quarantined == prompts.quarantined
    assert resumed.num_quarantined == 3
    resumed.draw(9)
    assert (len(resumed.quarantined), resumed.num_quarantined) == (3, 3), "met again, not counted again"

    monkeypatch.setattr(quarantine, "MAX_KEPT", 2)
    with pytest.raises(ValueError, match=r"3 of 6 rows are malformed:\n.*p.jsonl:1: .*\n.*p.jsonl:3: "):
        source(path, strict=True)


def test_a_position_of_other_data_is_refused(tmp_path):
    position = source(write(tmp_path / "p.jsonl", [good(1)])).position
    with pytest.raises(ValueError, match="same files, seed and order"):
        source(write(tmp_path / "q.jsonl", [good(1), good(2)])).seek(position)
    with pytest.raises(ValueError, match="same files, seed and order"):
        source(str(tmp_path / "p.jsonl"), seed=5).seek(position)
