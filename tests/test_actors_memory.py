"""How much memory a process says it holds."""

import numpy as np
import psutil

from actors.memory import available_bytes, resident_bytes


def test_memory_that_is_used_is_counted_in_bytes():
    before = resident_bytes()
    block = np.ones(64 * 2**20, dtype=np.uint8)
    assert 56 * 2**20 < resident_bytes() - before < 96 * 2**20
    assert block[-1] == 1


def test_where_the_system_does_not_say_it_is_the_most_so_far(monkeypatch):
    now = resident_bytes()

    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr("actors.memory.open", missing, raising=False)
    assert now // 2 < resident_bytes() < 100 * now, "in the same unit"


def test_what_is_left_is_what_the_system_says():
    assert 0 < available_bytes() < 1.2 * psutil.virtual_memory().available


def test_the_limit_of_a_container_is_kept_where_it_is_less(monkeypatch, tmp_path):
    files = {"/sys/fs/cgroup/memory.max": "5000", "/sys/fs/cgroup/memory.current": "3000"}

    def written(path, **options):
        if path in files:
            (tmp_path / "file").write_text(files[path], encoding="ascii")
            return open(tmp_path / "file", encoding="ascii")
        return open(path, **options)

    monkeypatch.setattr("actors.memory.open", written, raising=False)
    assert available_bytes() == 2000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert available_bytes() > 2**20
