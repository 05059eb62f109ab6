"""How much memory a process says it holds."""

import numpy as np

from actors.memory import resident_bytes


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
