import errno
import os

import pyarrow as pa
import pytest

from cluster.storage import Disk, RunStorage, StorageError


def _checkpoint(storage, step, text="weights"):
    directory = storage.begin_checkpoint(step)
    storage.write_text(text, directory, "state")
    storage.commit_checkpoint(step)


class FullDisk(Disk):
    """Takes half of every write."""

    def write(self, path, content, *, is_added=False):
        with open(path, "ab" if is_added else "wb") as file:
            file.write(bytes(content)[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def test_an_abandoned_checkpoint_is_absent(tmp_path):
    storage = RunStorage(str(tmp_path))
    _checkpoint(storage, 3)
    directory = storage.begin_checkpoint(6)
    storage.write_text("half", directory, "state")
    storage.abandon_checkpoint(6)
    storage.abandon_checkpoint(7)  # nothing was begun
    assert os.listdir(tmp_path / "checkpoints") == ["step-3"]
    assert storage.newest_checkpoint() == (3, str(tmp_path / "checkpoints" / "step-3"))
    with pytest.raises(AssertionError, match="must be begun"):
        storage.commit_checkpoint(6)


def test_a_checkpoint_begun_again_has_another_directory(tmp_path):
    """What a lost rank of the first attempt still writes goes nowhere."""
    storage = RunStorage(str(tmp_path))
    first = storage.begin_checkpoint(6)
    second = storage.begin_checkpoint(6)
    assert first != second
    assert not os.path.exists(first)
    storage.write_text("weights", second, "state")
    storage.commit_checkpoint(6)
    assert os.listdir(tmp_path / "checkpoints") == ["step-6"]


def test_a_leftover_that_has_the_name_is_not_written_into(tmp_path):
    """A process of a container often has the number of the one before."""
    old = RunStorage(str(tmp_path)).begin_checkpoint(6)
    (tmp_path / "checkpoints" / os.path.basename(old) / "stale").touch()
    storage = RunStorage(str(tmp_path))
    _checkpoint(storage, 6)
    assert sorted(os.listdir(tmp_path / "checkpoints" / "step-6")) == ["manifest.json", "state"]


def test_a_share_that_is_not_there_is_named(tmp_path):
    storage = RunStorage(str(tmp_path))
    storage.begin_checkpoint(6)
    with pytest.raises(
        StorageError, match=r"lacks \['share'\]; choose a run.dir on a file system that all nodes share"
    ):
        storage.commit_checkpoint(6, files=["share"])
    assert storage.newest_checkpoint() is None


def test_a_whole_checkpoint_is_not_replaced_and_a_damaged_one_is_set_aside(tmp_path):
    storage, said = RunStorage(str(tmp_path)), []
    storage.open_for_writing(said.append)
    state = tmp_path / "checkpoints" / "step-1" / "state"
    _checkpoint(storage, 1, "first")
    _checkpoint(storage, 1, "second")
    assert state.read_text() == "first"
    assert said == []
    for number in range(2):
        state.write_text("damage")
        _checkpoint(storage, 1, f"again {number}")
        assert state.read_text() == f"again {number}"
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-1", "step-1.damaged", "step-1.damaged-2"]
    assert len(said) == 2
    assert "checkpoint 1 is damaged and written again" in said[0]


def test_only_the_newest_are_kept(tmp_path):
    storage = RunStorage(str(tmp_path))
    for step in (2, 10, 9):
        _checkpoint(storage, step)
    storage.keep_checkpoints(2)
    assert storage.checkpoints() == [9, 10]
    assert len(os.listdir(tmp_path / "checkpoints")) == 2


def test_readers_leave_a_damaged_checkpoint_where_it_is(tmp_path, caplog):
    storage = RunStorage(str(tmp_path))
    for step in (1, 2):
        _checkpoint(storage, step)
    (tmp_path / "checkpoints" / "step-2" / "state").write_text("damage")
    assert storage.newest_checkpoint()[0] == 1
    assert "checkpoint 2 is damaged and not used: state does not match its recorded hash" in caplog.text
    assert storage.checkpoints() == [1, 2]
    said = []
    storage.open_for_writing(said.append)
    assert storage.newest_checkpoint()[0] == 1
    assert storage.checkpoints() == [1]
    assert os.listdir(tmp_path / "checkpoints" / "step-2.damaged")
    assert "checkpoint 2 is damaged" in said[0]
    assert storage.newest_checkpoint()[0] == 1
    assert len(said) == 1


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    storage = RunStorage(str(tmp_path))
    _checkpoint(storage, 1)

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr("cluster.checkpoints.sha256_of", refuse)
    with pytest.raises(PermissionError):
        storage.newest_checkpoint()


def test_opening_for_writing_removes_leftovers_and_nothing_else(tmp_path):
    storage = RunStorage(str(tmp_path))
    _checkpoint(storage, 1)
    kept = ["notes.tmp", "rollouts/step-1.parquet.tmp", "checkpoints/step-1/a.1-2.tmp", "checkpoints/step-2.damaged/a"]
    gone = ["config.yaml.12-0.tmp", "rollouts/step-1.parquet.3-14.tmp", "checkpoints/step-6.5-0.tmp/run.json.5-1.tmp"]
    for name in (*kept, *gone):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    storage.open_for_writing(print)
    assert [name for name in (*kept, *gone) if (tmp_path / name).exists()] == kept
    assert not (tmp_path / "checkpoints" / "step-6.5-0.tmp").exists()
    assert storage.newest_checkpoint()[0] == 1


@pytest.mark.parametrize("name", ["config.yaml", "new.yaml"])
def test_failed_write_leaves_the_old_file(tmp_path, name):
    RunStorage(str(tmp_path)).write_text("old", "config.yaml")
    with pytest.raises(UnicodeEncodeError):
        RunStorage(str(tmp_path)).write_text("\ud800", name)
    with pytest.raises(OSError, match="No space left"):
        RunStorage(str(tmp_path), FullDisk()).write_text("newer", name)
    assert RunStorage(str(tmp_path)).read_text("config.yaml") == "old"
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_failed_addition_leaves_the_lines_before(tmp_path):
    storage = RunStorage(str(tmp_path))
    storage.append_text("one\n", "journal")
    with pytest.raises(OSError, match="No space left"):
        RunStorage(str(tmp_path), FullDisk()).append_text("two is long\n", "journal")
    storage.append_text("three\n", "journal")
    assert storage.read_text("journal") == "one\nthree\n"


def test_table_round_trip(tmp_path):
    storage = RunStorage(str(tmp_path))
    schema = pa.schema([("step", pa.int64())], metadata={"after": '{"prompts": 3}'})
    table = pa.table({"step": [1, 2]}, schema=schema)
    storage.write_table(table, "rollouts", "step-1.parquet")
    found = storage.read_table("rollouts", "step-1.parquet")
    assert found.equals(table)
    assert found.schema.metadata == {b"after": b'{"prompts": 3}'}
    storage.remove("rollouts", "step-1.parquet")
    storage.remove("rollouts", "step-1.parquet")
    assert not storage.exists("rollouts", "step-1.parquet")
