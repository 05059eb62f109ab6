import contextlib
import copy
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from actors import streams, wires
from actors.buckets import WeightError
from actors.streams import StreamError, StreamReceiver, StreamSender
from tests.weights_toys import Background, Recorder, network, offer_of, receiving, same_bits, send

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True, params=["gloo", "staged"])
def wire(request, monkeypatch):
    """Every stream over gloo, and over what NCCL's has around it, with gloo's group inside."""
    if request.param == "staged":
        if "how" in request.fixturenames:
            pytest.skip("other processes have the wire that they have")

        def group(store, **settings):
            return wires.gloo_group(store, hostname="127.0.0.1", **settings)

        def open_wire(kind, *arguments, **settings):
            return wires.open_wire("nccl", *arguments, **settings)

        monkeypatch.setattr(wires, "_nccl_group", group)
        monkeypatch.setattr(wires, "_own_device", lambda: torch.device("cpu"))
        monkeypatch.setattr(streams, "open_wire", open_wire)
    return request.param


@pytest.fixture
def sender():
    sender = StreamSender("127.0.0.1")
    yield sender
    sender.close()


def test_two_receivers_get_every_bit_and_the_group_stays(sender):
    receivers = {name: StreamReceiver() for name in "ab"}
    engines = {name: Recorder(network(0)) for name in "ab"}
    groups = []
    for version in (7, 8):
        offer = offer_of(sender, "ab", version=version)
        coming = [receiving(receivers[name], offer, name, engines[name]) for name in "ab"]
        learner = network(version)
        send(sender, offer, learner)
        for waiting in coming:
            assert waiting.result().keys() == {"wait_s", "verify_s", "load_s"}
        for engine in engines.values():
            assert same_bits(engine.module, learner)
            assert engine.version == version
        groups.append(sender._group)
    assert groups[0] is groups[1]
    assert engines["a"].calls[:3] == ["begin 7 drain", "load", "load"]


def test_another_epoch_is_a_group_of_other_members(sender):
    a, b = StreamReceiver(), StreamReceiver()
    for epoch, members in ((1, "a"), (2, "ab"), (3, "b")):
        offer = offer_of(sender, members, epoch=epoch, version=epoch)
        engines = [Recorder(network(0)) for _ in members]
        coming = [receiving({"a": a, "b": b}[m], offer, m, e) for m, e in zip(members, engines, strict=True)]
        send(sender, offer, network(epoch))
        for waiting, engine in zip(coming, engines, strict=True):
            waiting.result()
            assert same_bits(engine.module, network(epoch))


def test_who_does_not_come_is_waited_for_as_long_as_allowed(sender):
    offer = offer_of(sender, "ab", timeout_s=1.0)
    coming = receiving(StreamReceiver(), offer, "a", Recorder(network(0)))
    started = time.monotonic()
    with pytest.raises(StreamError, match=r"could not be offered to a, b.*through the object store"):
        send(sender, offer, network(1))
    assert time.monotonic() - started < 4
    with pytest.raises(StreamError, match="version 7 did not begin to come"):
        coming.result()


def test_a_damaged_bucket_is_refused_and_nobody_waits_for_its_receiver(sender):
    def damage(index, raw):
        raw[0] ^= index == 1

    offer = offer_of(sender, "a")
    engine = Recorder(network(0))
    receiver = StreamReceiver()
    coming = receiving(receiver, offer, "a", engine)
    started = time.monotonic()
    with contextlib.suppress(StreamError):  # where not everything is on its way already
        send(sender, offer, network(1), damage=damage)
    with pytest.raises(WeightError, match=r"'embed\.weight' must have fingerprint"):
        coming.result()
    assert time.monotonic() - started < 5
    assert engine.version == -1  # and "end" has not been called: it must not decode
    assert "end" not in engine.calls
    again = offer_of(sender, "a", epoch=2, version=8)
    coming = receiving(receiver, again, "a", engine)
    send(sender, again, network(2))
    coming.result()
    assert same_bits(engine.module, network(2))


LARGE = nn.ModuleDict({"embed": nn.Embedding(500_000, 10)})
"""More bytes than sockets hold."""


def test_a_receiver_that_hangs_holds_the_sender_for_one_timeout(sender):
    offer = offer_of(sender, "ab", timeout_s=1.0)
    engine = Recorder(copy.deepcopy(LARGE))
    hanging = Background(lambda: StreamReceiver().open(offer.seat("b")))  # and takes nothing more
    coming = receiving(StreamReceiver(), offer, "a", engine)
    started = time.monotonic()
    with pytest.raises(StreamError, match="could not be sent"):
        send(sender, offer, LARGE, max_elements=1_000_000)
    assert time.monotonic() - started < 2.5
    assert hanging.result().version == 7
    with pytest.raises(StreamError, match="broke off in bucket"):
        coming.result()
    assert engine.version == -1


RECEIVE = """
import json, os, signal, sys
from actors.streams import StreamOffer, StreamReceiver
fields = json.loads(sys.argv[1])
offer = StreamOffer(**{**fields, "members": tuple(fields["members"])})
print("ready", flush=True)
stream = StreamReceiver().open(offer.seat("b"))
os.kill(os.getpid(), getattr(signal, sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_process_that_dies_or_stops_in_the_middle(sender, how):
    offer = offer_of(sender, "ab", timeout_s=5.0)
    command = [sys.executable, "-c", RECEIVE, json.dumps(asdict(offer)), how]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"ready\n"  # and not while it imports
        coming = receiving(StreamReceiver(), offer, "a", Recorder(copy.deepcopy(LARGE)))
        started = time.monotonic()
        with pytest.raises(StreamError):
            send(sender, offer, LARGE, max_elements=1_000_000)
        assert time.monotonic() - started < (3 if how == "SIGKILL" else 8)
        with pytest.raises(StreamError):
            coming.result()
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
