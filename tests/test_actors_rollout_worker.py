import asyncio
import pickle
import threading
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import LlamaForCausalLM

from actors import faults
from actors.config import ArchitectureConfig, CharacterTokenizerConfig, PolicyConfig, RolloutsConfig
from actors.engine import SamplingParams
from actors.policy import load_model, materialize
from actors.rollout_worker import Lease, RolloutError, RolloutWorker
from actors.schema import PROMPTS, ROLLOUTS, check
from actors.weights import Bucket, InProcessTransport, Publication, WeightError, pack_bucket

ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
POLICY = PolicyConfig(
    model=ArchitectureConfig(
        architecture=ARCHITECTURE, tokenizer=CharacterTokenizerConfig(characters="abcdefghijklmnopqrstuvwxyz")
    ),
    dtype="float32",
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> str:
    return materialize(POLICY, seed=0, cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def make_worker(model_dir):
    workers = []

    def make(transport=None, **options) -> RolloutWorker:
        worker = RolloutWorker(
            model_dir=model_dir,
            policy=POLICY,
            rollouts=RolloutsConfig(max_rows=8),
            transport=transport or InProcessTransport(),
            run_id="run-1",
            seed=0,
            device="cpu",
            num_threads=1,
            **options,
        )
        workers.append(worker)
        return worker

    yield make
    for worker in workers:
        asyncio.run(asyncio.wait_for(worker.close(), 20))


def prompt(name: str, ids) -> pa.Table:
    row = {"prompt_id": [name], "prompt": [name], "prompt_ids": [list(ids)], "extras": ['{"k": 1}']}
    return pa.table(row, schema=PROMPTS)


def lease(name: str, *, lease_id: int = 3, num_samples: int = 3, **sampling) -> Lease:
    return Lease(
        lease_id=lease_id,
        epoch=0,
        group_id=f"0/{name}",
        incarnation=2,
        num_samples=num_samples,
        sampling=SamplingParams(**{"max_new_tokens": 10, **sampling}),
        seed=11,
    )


def publication(model: torch.nn.Module, version: int) -> Publication:
    buffer, entries = pack_bucket(list(model.named_parameters()))
    bucket = Bucket(entries=entries, num_bytes=len(buffer), handle=buffer)
    return Publication(version=version, incarnation=0, buckets=(bucket,))


def other_weights(model_dir: str) -> LlamaForCausalLM:
    model = load_model(model_dir, dtype=torch.float32, device=torch.device("cpu"))
    torch.manual_seed(9)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


def within(awaitable, seconds: float = 30):
    async def bounded():
        return await asyncio.wait_for(awaitable, seconds)

    return asyncio.run(bounded())


def test_a_group_is_a_complete_rollouts_table(make_worker):
    table, numbers = within(make_worker().generate(prompt("q", [1, 2, 3]), lease("q")))
    check(table, ROLLOUTS, "test")
    assert table["sample_index"].to_pylist() == [0, 1, 2]
    expected = {
        "prompt_id": "q", "prompt_ids": [1, 2, 3], "extras": '{"k": 1}', "run_id": "run-1", "incarnation": 2,
        "group_id": "0/q", "lease_id": 3,
    }  # fmt: skip
    for row in table.to_pylist():
        assert {name: row[name] for name in expected} == expected
        length = len(row["response_ids"])
        assert [len(row[name]) for name in ("logprobs", "policy_versions", "loss_mask")] == [length] * 3
        assert all(row["loss_mask"])
        assert row["finish_reason"] in ("eos", "length")
    assert numbers["num_tokens"] == sum(map(len, table["response_ids"].to_pylist()))
    assert numbers["generate_s"] > 0


def test_a_worker_says_in_process_lists_what_it_is(make_worker):
    assert repr(make_worker()) == "RolloutWorker(run run-1, engine torch, 8 rows, cpu)"


def test_a_retried_lease_on_a_busy_worker_gives_the_same_rows(make_worker):
    async def crowd(worker):
        others = [worker.generate(prompt(f"o{i}", range(1, 3 + i)), lease(f"o{i}", num_samples=4)) for i in range(5)]
        again = worker.generate(prompt("q", [1, 2, 3]), lease("q", lease_id=8))
        return (await asyncio.gather(*others, again))[-1][0]

    alone, _ = within(make_worker().generate(prompt("q", [1, 2, 3]), lease("q")))
    busy = within(crowd(make_worker()))
    for name in ROLLOUTS.names:
        if name != "lease_id":
            assert busy[name].to_pylist() == alone[name].to_pylist()
    assert set(busy["lease_id"].to_pylist()) == {8}


def test_an_update_waits_for_earlier_groups_and_holds_back_later_ones(make_worker, model_dir):
    async def scenario(worker, model):
        assert await worker.ping() == -1
        await worker.update_weights(publication(model, 0))
        early = [asyncio.create_task(worker.generate(prompt(n, [5, 6]), lease(n))) for n in "ab"]
        await asyncio.sleep(0)  # both are queued
        update = asyncio.create_task(worker.update_weights(publication(model, 1)))
        seconds = await update
        late = await worker.generate(prompt("a", [5, 6]), lease("a", lease_id=4))
        assert await worker.ping() == 1
        return [(await task)[0] for task in early], late[0], seconds

    early, late, seconds = within(scenario(make_worker(), other_weights(model_dir)))
    assert {v for table in early for versions in table["policy_versions"].to_pylist() for v in versions} == {0}
    assert {v for versions in late["policy_versions"].to_pylist() for v in versions} == {1}
    assert early[0]["logprobs"].to_pylist() == late["logprobs"].to_pylist()  # same weights, same draws
    assert seconds > 0


def test_new_weights_are_the_ones_published(make_worker, model_dir):
    model = other_weights(model_dir)
    worker = make_worker()

    async def scenario():
        before, _ = await worker.generate(prompt("q", [1, 2]), lease("q", temperature=0.7))
        await worker.update_weights(publication(model, 4))
        return before, (await worker.generate(prompt("q", [1, 2]), lease("q", temperature=0.7)))[0]

    before, after = within(scenario())
    for table, should_match in ((after, True), (before, False)):
        row = table.to_pylist()[0]
        ids = torch.tensor([[1, 2, *row["response_ids"]]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, 1:-1] / 0.7
        expected = torch.log_softmax(logits, -1).gather(1, ids[0, 2:, None])[:, 0].numpy()
        assert (np.abs(expected - row["logprobs"]).max() < 1e-4) == should_match


def test_a_bad_request_fails_only_its_own_group(make_worker):
    async def scenario(worker):
        calls = [
            worker.generate(prompt("good", [1, 2]), lease("good")),
            worker.generate(prompt("long", range(1, 25)), lease("long", max_new_tokens=60)),
            worker.generate(prompt("good", [1, 2]), lease("good")),  # the same lease twice
            worker.generate(pa.table({"x": [1]}), lease("table")),
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    good, long, twice, table = within(scenario(make_worker()))
    assert good[0].num_rows == 3
    for error, message in ((long, "must fit into 64 tokens"), (twice, "must be unique"), (table, "must have column")):
        assert isinstance(error, ValueError)
        assert message in str(error)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_engine_failure_fails_the_groups_in_flight_and_the_worker_recovers(make_worker, model_dir):
    model = other_weights(model_dir)
    sick = {name: value.detach() * torch.nan for name, value in model.named_parameters()}
    buffer, entries = pack_bucket(list(sick.items()))
    bad = Publication(version=1, incarnation=0, buckets=(Bucket(entries=entries, num_bytes=1, handle=buffer),))

    async def scenario(worker):
        await worker.update_weights(bad)
        calls = [worker.generate(prompt(n, [1, 2]), lease(n)) for n in "abc"]
        failed = await asyncio.gather(*calls, return_exceptions=True)
        await worker.update_weights(publication(model, 2))
        return failed, (await worker.generate(prompt("a", [1, 2]), lease("a")))[0]

    failed, table = within(scenario(make_worker()))
    assert all(isinstance(error, RolloutError) and "must be finite" in str(error) for error in failed)
    assert isinstance(pickle.loads(pickle.dumps(failed[0])), RolloutError)
    assert table.num_rows == 3


def test_a_damaged_update_is_an_error_and_nothing_is_sampled_from_it(make_worker, model_dir):
    model = other_weights(model_dir)
    damaged = publication(model, 1)
    damaged.buckets[0].handle[-100] ^= 1

    async def scenario(worker):
        with pytest.raises(WeightError, match="fingerprint"):
            await worker.update_weights(damaged)
        assert await worker.ping() == -1
        await worker.update_weights(publication(model, 1))
        return await worker.ping()

    assert within(scenario(make_worker())) == 1


def test_a_transport_failure_reaches_the_caller(make_worker, model_dir):
    class Broken(InProcessTransport):
        def get(self, handle):
            raise OSError("the owner of this object died")

    model = other_weights(model_dir)

    async def scenario(worker):
        with pytest.raises(RolloutError, match="OSError: the owner"):
            await worker.update_weights(publication(model, 1))
        return (await worker.generate(prompt("a", [1, 2]), lease("a")))[0]

    assert within(scenario(make_worker(Broken()))).num_rows == 3


def test_weights_that_never_come_are_an_error_in_time_and_the_next_publication_is_taken(make_worker, model_dir):
    release = threading.Event()

    class Hanging(InProcessTransport):
        def get(self, handle):
            if not handle.flags.writeable:
                release.wait(30)  # e.g. its owner is stopped, on another node
            return handle

    model = other_weights(model_dir)
    lost = publication(model, 1)
    for bucket in lost.buckets:
        bucket.handle.flags.writeable = False

    async def scenario(worker):
        started = time.monotonic()
        with pytest.raises(RolloutError, match=r"version 1 must be fetched within 0\.2 s and was not"):
            await worker.update_weights(lost)
        seconds = time.monotonic() - started
        served = await worker.generate(prompt("a", [1, 2]), lease("a"))
        await worker.update_weights(publication(model, 2))
        release.set()
        await asyncio.sleep(0.1)  # the late buffers change nothing
        return seconds, served[0].num_rows, await worker.ping()

    seconds, num_rows, version = within(scenario(make_worker(Hanging(), fetch_timeout_s=0.2)))
    assert 0.2 <= seconds < 2
    assert (num_rows, version) == (3, 2)


class Wedge:
    """Takes the place of an engine's method and holds its thread until it is released."""

    def __init__(self, engine, method):
        self.original, self.reached, self.release = getattr(engine, method), threading.Event(), threading.Event()
        setattr(engine, method, self)

    def __call__(self, *arguments):
        self.reached.set()
        self.release.wait(30)
        return self.original(*arguments)


@pytest.mark.parametrize("method", ["step", "load"])
def test_a_ping_says_that_the_engine_hangs_and_that_it_goes_on(make_worker, model_dir, method):
    model = other_weights(model_dir)

    async def scenario(worker):
        await asyncio.sleep(0.5)  # idle for longer than the limit
        wedge = Wedge(worker._thread._engine, method)
        busy = worker.generate(prompt("a", [1]), lease("a")) if method == "step" else None
        task = asyncio.create_task(busy or worker.update_weights(publication(model, 1)))
        while not wedge.reached.is_set():
            assert await worker.ping() == -1
            await asyncio.sleep(0.01)
        assert await worker.ping() == -1  # not yet for long
        await asyncio.sleep(0.5)
        with pytest.raises(RolloutError, match=r"must take a turn within 0\.4 s .* has not for 0\.\d s"):
            await worker.ping()
        wedge.release.set()
        await task
        return await worker.ping()

    assert within(scenario(make_worker(stall_s=0.4))) == (-1 if method == "step" else 1)


def test_a_ping_knows_a_slow_engine_from_one_that_hangs_and_a_limit_of_0_knows_none(make_worker):
    async def pings(worker, seconds):
        step = worker._thread._engine.step
        worker._thread._engine.step = lambda: time.sleep(seconds) or step()
        task = asyncio.create_task(worker.generate(prompt("a", [1]), lease("a", max_new_tokens=8)))
        started, failures = time.monotonic(), 0
        while not task.done():
            try:
                await worker.ping()
            except RolloutError:
                failures += 1
            await asyncio.sleep(0.02)
        return time.monotonic() - started, failures

    seconds, failures = within(pings(make_worker(stall_s=0.5), 0.15))
    assert seconds > 1.0  # longer than the limit, each step within it
    assert failures == 0
    assert within(pings(make_worker(), 0.3))[1] == 0
    assert within(pings(make_worker(stall_s=0.1), 0.3))[1] > 0


@pytest.mark.parametrize(
    ("point", "kind"),
    [("rollout.generate", RuntimeError), ("rollout.decode", RolloutError), ("rollout.fetch_weights", RolloutError)],
)
def test_fault_points_fail_one_call_and_the_worker_goes_on(make_worker, model_dir, monkeypatch, point, kind):
    monkeypatch.setattr(faults, "_FAULTS", faults._parse(f"{point}@2=raise"))
    monkeypatch.setattr(faults, "_REACHED", faults.Counter())
    monkeypatch.delenv("CONCORD_FAULTS_DIR", raising=False)
    model = other_weights(model_dir)

    async def outcome(awaitable):
        return (await asyncio.gather(awaitable, return_exceptions=True))[0]

    async def scenario(worker):
        outcomes = []
        for version in range(3):
            outcomes.append(await outcome(worker.update_weights(publication(model, version))))
            group = lease("a", num_samples=1, max_new_tokens=1)
            outcomes.append(await outcome(worker.generate(prompt("a", [1, 2]), group)))
        return outcomes

    outcomes = within(scenario(make_worker()))
    failed = [index for index, value in enumerate(outcomes) if isinstance(value, Exception)]
    # One call a version loads, the next one generates; a group of one token is decoded in one step.
    assert failed == [2 if point == "rollout.fetch_weights" else 3]
    assert type(outcomes[failed[0]]) is kind
    assert point in str(outcomes[failed[0]])


def test_cancelling_a_call_frees_its_rows(make_worker):
    async def scenario(worker):
        task = asyncio.create_task(worker.generate(prompt("a", [1]), lease("a", num_samples=500, max_new_tokens=60)))
        while not (await worker.stats())["num_live_rows"]:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        again = await worker.generate(prompt("a", [1]), lease("a"))  # its id is free again
        return again[0].num_rows, await worker.stats()

    rows, stats = within(scenario(make_worker()))
    assert rows == 3
    assert stats["num_completions"] < 500
    assert stats["num_live_rows"] == stats["num_waiting_requests"] == 0


def test_closing_fails_what_waits_and_refuses_what_comes(make_worker):
    async def scenario(worker):
        task = asyncio.create_task(worker.generate(prompt("a", [1]), lease("a", num_samples=500, max_new_tokens=60)))
        await asyncio.sleep(0.05)
        await worker.close()
        with pytest.raises(RolloutError, match="ended"):
            await task
        with pytest.raises(RolloutError, match="ended"):
            await worker.generate(prompt("b", [1]), lease("b"))

    within(scenario(make_worker()))
