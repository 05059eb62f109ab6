"""Weights and ranks between two hosts: networks joined by a cable where this machine allows them, two processes always.

The first host has the learner's rank, the second two receivers.
"""

import contextlib
import hashlib
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from actors.streams import IncomingStream, StreamError, StreamOffer, StreamReceiver
from actors.weights import InProcessTransport
from actors.wires import GLOO_INTERFACES
from learner.config import OptimizerConfig
from learner.optimizer import make_engine
from learner.process_group import join_group
from learner.publisher import Publisher
from tests.two_hosts import Host, plug_in, pull_out, two_hosts, two_processes
from tests.weights_toys import Background, Recorder

MEMBERS = ("a", "b")
CONFIG = LlamaConfig(
    vocab_size=100_000, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
"""More bytes than sockets hold."""
BUCKET_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Pair:
    sends: Host
    receives: Host
    part: Callable[[], None]
    """Let no byte pass any more."""
    join: Callable[[], None]


NETWORKS = {"hosts": ("10.11.0.1", "10.11.0.2"), "hosts with IPv6": ("fd11::1", "fd11::2")}


@pytest.fixture(scope="module", params=["processes", "hosts", pytest.param("hosts with IPv6", marks=pytest.mark.slow)])
def pair(request):
    with contextlib.ExitStack() as stack:
        if request.param == "processes":
            sends, receives = stack.enter_context(two_processes())
            pid = receives.run(os.getpid)
            yield Pair(
                sends=sends,
                receives=receives,
                part=lambda: os.kill(pid, signal.SIGSTOP),
                join=lambda: os.kill(pid, signal.SIGCONT),
            )
            return
        try:
            sends, receives = stack.enter_context(two_hosts(*NETWORKS[request.param]))
        except OSError as error:
            pytest.skip(f"this machine cannot have two networks: {error}")
        yield Pair(
            sends=sends,
            receives=receives,
            part=lambda: receives.run(pull_out),
            join=lambda: receives.run(plug_in, receives.address),
        )


@dataclass(kw_only=True)
class Side:
    """What one host's process keeps from call to call."""

    publishers: list[Publisher] = field(default_factory=list)
    receivers: dict[str, StreamReceiver] = field(default_factory=lambda: {name: StreamReceiver() for name in MEMBERS})
    engines: dict[str, Recorder] = field(default_factory=dict)
    streams: dict[str, IncomingStream] = field(default_factory=dict)


SIDE = Side()


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(CONFIG)


def digest(module: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for parameter in module.parameters():
        found.update(parameter.detach().numpy().tobytes())
    return found.hexdigest()


def offer_at(address: str, version: int, timeout_s: float) -> StreamOffer:
    """Offer a version to all members, as the driver does, in a group of its own."""
    if not SIDE.publishers:
        os.environ["MASTER_ADDR"] = address  # as for ranks
        policy = model(1)
        engine = make_engine(
            policy, OptimizerConfig(), backend="local", zero_stage=0, rank=0, world_size=1, dtype=torch.float32
        )
        SIDE.publishers.append(Publisher(policy, engine, InProcessTransport(), bucket_bytes=BUCKET_BYTES))
    address, port = SIDE.publishers[0].endpoint()
    return StreamOffer(
        epoch=version, address=address, port=port, members=MEMBERS, version=version, incarnation=0, timeout_s=timeout_s
    )


def publish(offer: StreamOffer) -> tuple[str, str, float]:
    """Change and send the weights; return why it failed, what was sent, and the seconds it took."""
    [publisher] = SIDE.publishers
    with torch.no_grad():
        for parameter in publisher.policy.parameters():
            parameter.add_(offer.version)
    started = time.monotonic()
    failure = publisher.publish(offer.version, 0, offer=offer).failure
    seconds = time.monotonic() - started
    return failure, digest(publisher.policy), seconds


def join(offer: StreamOffer) -> None:
    """Let all members wait for their first bucket."""
    if not SIDE.engines:
        SIDE.engines = {name: Recorder(model(2)) for name in offer.members}
    coming = {name: Background(lambda name=name: SIDE.receivers[name].open(offer.seat(name))) for name in offer.members}
    SIDE.streams = {name: each.result() for name, each in coming.items()}


def take() -> list[tuple[str, str, float]]:
    """Let all members load; return for each why it failed, what it has, and the seconds it took."""

    def load(name: str) -> tuple[str, str, float]:
        engine, failure, started = SIDE.engines[name], "", time.monotonic()
        try:
            SIDE.streams[name].load_into(engine, "drain")
        except StreamError as error:
            failure = str(error)
        seconds = time.monotonic() - started
        return failure, digest(engine.module), seconds

    coming = [Background(lambda name=name: load(name)) for name in SIDE.streams]
    return [each.result() for each in coming]


def broadcast(pair: Pair, version: int) -> None:
    """Bring a version to all members, and make sure that it is what was sent."""
    offer = pair.sends.run(offer_at, pair.sends.address, version, 20.0)
    assert offer.address == pair.sends.address
    sent = pair.sends.begin(publish, offer)
    pair.receives.run(join, offer)
    taken = pair.receives.run(take)
    failure, bits, _ = sent.result(30)
    assert failure == ""
    assert [each[:2] for each in taken] == [("", bits)] * len(MEMBERS)


def test_weights_arrive_bit_for_bit_also_after_a_broadcast_that_broke_off(pair):
    broadcast(pair, 1)
    offer = pair.sends.run(offer_at, pair.sends.address, 2, 1.0)
    sent = pair.sends.begin(publish, offer)
    pair.receives.run(join, offer)
    pair.part()
    taken = pair.receives.begin(take)
    try:
        failure, _, seconds = sent.result(30)
    finally:
        pair.join()  # by the second host itself, where it has a cable: once its members have given up
    assert seconds < 3
    assert f"version 2 could not be sent to a, b from {offer.address}:{offer.port}: " in failure
    assert "let their nodes reach each other on every port" in failure
    for failure, _, seconds in taken.result(30):
        assert seconds < 3
        assert "version 2 broke off in bucket " in failure
        assert f" from {offer.address}:{offer.port}: " in failure
    broadcast(pair, 3)


def join_ranks(rank: int, address: str, port: int) -> tuple[list[float], str]:
    """Be a rank of two: add up its number and its peer's in the group, and in one like DeepSpeed's own."""
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port), "CONCORD_GROUP_TIMEOUT_S": "20"}
    join_group(rank, 2, torch.device("cpu"))
    sums = []
    for group in (dist.group.WORLD, dist.new_group([0, 1])):
        numbers = torch.tensor([float(rank + 1)])
        dist.all_reduce(numbers, group=group)
        sums.append(numbers.item())
    dist.destroy_process_group()
    return sums, os.environ.pop(GLOO_INTERFACES)


def free_port(address: str) -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as probe:
        return probe.getsockname()[1]


def test_ranks_find_each_other_whatever_their_hosts_names_stand_for(pair):
    address = pair.sends.address
    port = pair.sends.run(free_port, address)
    ranks = [host.begin(join_ranks, rank, address, port) for rank, host in enumerate((pair.sends, pair.receives))]
    interface = "lo" if address == "127.0.0.1" else "net0"
    assert [rank.result(30) for rank in ranks] == [([3.0, 3.0], interface)] * 2


def use(interface: str) -> None:
    os.environ[GLOO_INTERFACES] = interface


@pytest.mark.slow
def test_who_can_only_be_met_and_not_connected_to_holds_nobody_longer_than_allowed():
    """Both hosts are told to use an interface that leads nowhere."""
    with contextlib.ExitStack() as stack:
        try:
            sends, receives = stack.enter_context(two_hosts(*NETWORKS["hosts"]))
        except OSError as error:
            pytest.skip(f"this machine cannot have two networks: {error}")
        for host in (sends, receives):
            host.run(use, "bridge0")
        offer = sends.run(offer_at, sends.address, 1, 5.0)
        started = time.monotonic()
        waiting = receives.begin(join, offer)
        assert "could not be offered to a, b from 10.11.0.1:" in sends.begin(publish, offer).result(60)[0]
        with pytest.raises(StreamError, match=r"did not begin to come from 10\.11\.0\.1:"):
            waiting.result(60)
        assert time.monotonic() - started < 7
