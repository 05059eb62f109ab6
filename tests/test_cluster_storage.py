import os

import pyarrow as pa
import pytest

from cluster.storage import RunStorage, StorageError


def _checkpoint(storage, step, text="weights"):
    with storage.writing_checkpoint(step) as directory, open(os.path.join(directory, "state"), "w") as file:
        file.write(text)


def test_checkpoint_is_whole_or_absent(tmp_path):
    storage = RunStorage(str(tmp_path))
    _checkpoint(storage, 3)

    def interrupted():
        with storage.writing_checkpoint(6) as directory:
            open(os.path.join(directory, "half"), "w").close()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert storage.checkpoints() == [3]
    assert os.listdir(tmp_path / "checkpoints") == ["step-3"]
    assert os.path.isfile(os.path.join(storage.read_checkpoint(3), "state"))


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_damage_is_named(tmp_path, damage):
    storage = RunStorage(str(tmp_path))
    _checkpoint(storage, 1)
    path = tmp_path / "checkpoints" / "step-1" / "state"
    if damage == "delete":
        path.unlink()
    else:
        path.write_text({"truncate": "weig", "flip": "weighus"}[damage])
    with pytest.raises(StorageError, match="state must match its recorded hash"):
        storage.read_checkpoint(1)


def test_only_the_newest_are_kept(tmp_path):
    storage = RunStorage(str(tmp_path))
    for step in (2, 10, 9):
        _checkpoint(storage, step)
    storage.keep_checkpoints(2)
    assert storage.checkpoints() == [9, 10]


def test_failed_write_leaves_the_old_file(tmp_path):
    storage = RunStorage(str(tmp_path))
    storage.write_text("old", "config.yaml")
    with pytest.raises(UnicodeEncodeError):
        storage.write_text("\ud800", "config.yaml")
    assert storage.read_text("config.yaml") == "old"
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_table_round_trip(tmp_path):
    storage = RunStorage(str(tmp_path))
    table = pa.table({"step": [1, 2]})
    storage.write_table(table, "rollouts", "step-1.parquet")
    assert storage.read_table("rollouts", "step-1.parquet").equals(table)
