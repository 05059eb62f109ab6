"""Weights in memory that two processes share: what one writes the other reads, without a copy on the way."""

import dataclasses
import gc
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch

from actors import shared_memory
from actors.shared_memory import SharedMemoryError, SharedMemoryTransport
from actors.weights import WeightError, receive
from tests.test_learner_publisher import policy, publisher_of
from tests.weights_toys import Recorder, same_bits

SIZES = [1000, 64, 0, 333]

READER = """
import pickle, sys
from actors.shared_memory import SharedMemoryTransport

transport, handle = pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(transport.get(handle).numpy().tobytes())
"""

WRITER = """
import pickle, sys, time
from actors.shared_memory import SharedMemoryTransport

transport = SharedMemoryTransport("cpu")
(room,) = transport.rooms([4096])
sys.stdout.buffer.write(pickle.dumps(transport.put(room.fill_(7))))
sys.stdout.buffer.flush()
time.sleep(600)
"""


def written(seed: int, transport: SharedMemoryTransport):
    """Fill the rooms; return their handles and bytes."""
    generator = torch.Generator().manual_seed(seed)
    rooms = transport.rooms(SIZES)
    for room in rooms:
        room.random_(0, 256, generator=generator)
    return [transport.put(room) for room in rooms], [room.clone() for room in rooms]


def test_another_process_reads_what_was_written():
    transport = SharedMemoryTransport("cpu")
    given = pickle.dumps(transport)
    handles, raws = written(0, transport)
    for handle, raw in zip(handles, raws, strict=True):
        read = subprocess.run(
            [sys.executable, "-c", READER], input=pickle.dumps((pickle.loads(given), handle)), stdout=subprocess.PIPE
        )
        assert read.returncode == 0
        assert read.stdout == raw.numpy().tobytes()


def test_the_next_version_lies_where_the_one_before_lay():
    transport = SharedMemoryTransport("cpu")
    first, _ = written(0, transport)
    seen = transport.get(first[0])
    second, raws = written(1, transport)
    assert first == second
    assert torch.equal(seen, raws[0]), "one copy, whoever reads it"


def test_who_reads_cannot_change_what_others_read():
    transport = SharedMemoryTransport("cpu")
    (handle, *_), (raw, *_) = written(0, transport)
    transport.get(handle).zero_()
    assert torch.equal(transport.get(handle), raw)


def test_memory_ends_with_those_who_hold_it():
    gc.collect()
    before = num_memories()
    transport = SharedMemoryTransport("cpu")
    written(0, transport)
    transport.rooms([5000])
    assert num_memories() == before + 1, "of the memory before, nothing is left"
    del transport
    assert num_memories() == before


def num_memories() -> int:
    """Return how many shared memories this process has open."""
    places = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sum("concord-weights" in os.readlink(place) for place in places if os.path.islink(place))


def test_a_learner_that_is_gone_takes_its_memory_along():
    with subprocess.Popen([sys.executable, "-c", WRITER], stdout=subprocess.PIPE) as writer:
        handle = pickle.load(writer.stdout)
        transport = SharedMemoryTransport("cpu")
        held = transport.get(handle)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    assert held.sum() == 7 * 4096, "whoever reads comes to the end"
    with pytest.raises(RuntimeError, match="No such file"):
        transport.get(handle)


def test_another_machine_is_told_from_this_one():
    transport = SharedMemoryTransport("cpu")
    (handle, *_), _ = written(0, transport)
    with pytest.raises(SharedMemoryError, match="on one machine, and they are on two; set object_store"):
        transport.get(dataclasses.replace(handle, machine="another"))


def test_where_there_is_no_such_memory_the_setting_is_named(monkeypatch):
    monkeypatch.delattr(shared_memory.os, "memfd_create")
    with pytest.raises(SharedMemoryError, match=r"weights.transport shared_memory needs Linux .* set object_store"):
        SharedMemoryTransport("cpu").rooms([1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_published_policy_is_read_bit_by_bit(dtype):
    model, engine = policy(1, dtype), Recorder(policy(2, dtype))
    transport = SharedMemoryTransport("cpu")
    publisher = publisher_of(model, transport)
    for version in (3, 4):
        publication = publisher.publish(version, 0)
        receive(publication, transport, engine)
        assert engine.version == version
        assert same_bits(engine.module, model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
    publisher.publish(5, 0)
    with pytest.raises(WeightError, match="must have fingerprint"):
        receive(publication, transport, engine)  # of the version before, whose place has been taken
