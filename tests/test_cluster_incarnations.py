"""Numbers of lineages: durable, growing, and still there after an error of the disk."""

from itertools import islice

import pytest

from cluster.incarnations import DurableIncarnations
from cluster.storage import RunStorage


def test_numbers_grow_over_the_lives_of_a_run(tmp_path):
    storage = RunStorage(str(tmp_path))
    assert list(islice(DurableIncarnations(storage), 2)) == [0, 1]
    assert list(islice(DurableIncarnations(storage), 2)) == [2, 3]


def test_a_full_disk_is_not_the_end_of_them(tmp_path, monkeypatch):
    storage = RunStorage(str(tmp_path))
    numbers = DurableIncarnations(storage)
    assert next(numbers) == 0
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_text", _full)
        with pytest.raises(OSError, match="no space"):
            next(numbers)
    assert next(numbers) == 1


def _full(*_, **__):
    raise OSError("no space left on device")
