"""The pipeline's inside with workers that live in this process: refills, replays, failures, the thread around it."""

import json
import threading
import time

import pyarrow as pa
import pytest

from actors.encoding import PromptEncoder
from actors.policy import materialize
from actors.prompts import PromptSource
from cluster.config import RunConfig, validate
from cluster.distribution import WeightsLostError
from cluster.fleet import FleetError
from cluster.ledger import Ledger
from cluster.limits import DataError
from cluster.messages import Failure, FailureKind, Verb, Weights
from cluster.pipeline import Pipeline
from cluster.pipeline_core import PipelineCore
from reward.schema import SAMPLES

NUM_PROMPTS = 6


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from actors.config import PolicyConfig
    from actors.policy import load_tokenizer

    raw = {
        "model": {
            "architecture": {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 6},
            "tokenizer": {"characters": "abcd"},
        }
    }
    cache = str(tmp_path_factory.mktemp("cache"))
    return load_tokenizer(materialize(PolicyConfig(**raw), seed=0, cache_dir=cache), trust_remote_code=False)


class ScriptedWorkers:
    """Answers at once; `script` maps (verb, prompt or role) to what is answered instead, one after another."""

    def __init__(self):
        self.script = {}
        self.started, self.closed = [], False
        self.leases = []

    def start(self, worker):
        self.started.append(str(worker))

    def kill(self, worker):
        pass

    def close(self):
        self.closed = True

    def call(self, call, reply):
        name = call.lease.group_id if call.lease else str(call.worker.role)
        planned = self.script.get((call.verb, name))
        if planned:
            reply(call.call_id, planned.pop(0))
        elif call.verb is Verb.GENERATE:
            self.leases.append(call.payload.lease(call.lease.lease_id, call.lease.weights.incarnation))
            reply(call.call_id, ("rollouts " + name, {}))
        elif call.verb is Verb.SCORE:
            reply(call.call_id, ("scored " + name, _samples(name)))
        else:
            reply(call.call_id, None)


class Journal:
    def __init__(self):
        self.transitions, self.closed = [], False

    def append(self, transitions, now):
        self.transitions += transitions

    def close(self):
        self.closed = True


def _samples(group_id):
    row = {
        "group_id": group_id, "sample_index": 0, "num_prompt_tokens": 1, "num_response_tokens": 1, "num_loss_tokens": 1,
        "finish_reason": "eos", "components": [("x", 1.0)], "kl": 0.0, "oldest_version": 0, "newest_version": 0,
    }  # fmt: skip
    return pa.Table.from_pylist([row], schema=SAMPLES)


@pytest.fixture
def make(tmp_path, tokenizer):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "abcd"[n % 4], "id": f"p{n}"}) + "\n" for n in range(NUM_PROMPTS)))
    opened = []

    def build(**pipeline):
        raw = {
            "run": {"dir": str(tmp_path / "run"), "num_steps": 9},
            "policy": {"model": "unused/model"},
            "prompts": {"path": str(path), "shuffle": False},
            "rollouts": {"prompts_per_step": 2, "samples_per_prompt": 1, "max_new_tokens": 4, "max_rows": 4},
            "reward": {"components": {"x": {"function": "tests.rules:share_of_a"}}},
            "pipeline": {"max_restarts": 0, **pipeline},
        }
        config = validate(RunConfig, raw, where="test")
        prompts = PromptSource(config.prompts, PromptEncoder(tokenizer), seed=0, cache_dir=str(tmp_path))
        workers, journal = ScriptedWorkers(), Journal()
        core = PipelineCore(config, prompts=prompts, workers=workers, ledger=Ledger(), journal=journal)
        pipeline = Pipeline(core)
        opened.append(pipeline)
        pipeline.wait_ready()
        core.ask(core.publish, Weights(incarnation=0, version=0), "weights").result()
        return pipeline, workers, journal, prompts

    yield build
    for pipeline in opened:
        pipeline.close()


def _data(text="bad"):
    return Failure(kind=FailureKind.DATA, text=text)


def test_batches_follow_the_prompts_and_the_ledger_adds_up(make):
    pipeline, workers, journal, _ = make()
    for step, groups in ((1, ("0/p0", "0/p1")), (2, ("0/p2", "0/p3"))):
        batch = pipeline.take_batch(step)
        assert batch.group_ids == groups
        assert batch.tables == tuple("scored " + group for group in groups)
        assert batch.samples["group_id"].to_pylist() == list(groups)
        assert pipeline.settle(batch)["in_flight"] == 0
    assert pipeline.counts() == {"accepted": 4, "trained": 4, "dropped": 0, "quarantined": 0, "in_flight": 0}
    assert {lease.seed for lease in workers.leases} == {0}
    states = [str(t.state) for t in journal.transitions if t.group_id == "0/p3"]
    assert states == ["accepted", "leased", "generated", "scored", "batched", "trained"]


def test_the_next_prompt_takes_the_place_of_a_quarantined_group(make):
    pipeline, workers, _, prompts = make()
    workers.script[Verb.SCORE, "0/p1"] = [_data(), _data()]
    batch = pipeline.take_batch(1)
    assert batch.group_ids == ("0/p0", "0/p2")
    assert batch.quarantined == {"0/p1": "score: bad"}
    assert batch.after["prompts"] == {"next": prompts.position, "owed": []}
    assert pipeline.settle(batch) == {"accepted": 3, "trained": 2, "dropped": 0, "quarantined": 1, "in_flight": 0}


def test_a_replayed_batch_leaves_everything_as_the_first_time(make):
    first, workers, _, prompts = make()
    workers.script[Verb.SCORE, "0/p1"] = [_data(), _data()]
    batch = first.take_batch(1)
    first.settle(batch)
    second, _, _, again = make()
    second.replay_batch(batch)
    second.settle(batch)
    assert second.counts() == first.counts()
    assert again.position == prompts.position
    assert second.take_batch(2).group_ids == first.take_batch(2).group_ids == ("0/p3", "0/p4")


def test_a_snapshot_continues_and_epochs_follow(make):
    first, _, _, _ = make()
    first.settle(first.take_batch(1))
    state = json.loads(json.dumps(first.state_dict()))
    second, _, _, _ = make()
    second.load_state_dict(state)
    assert second.counts()["trained"] == 2
    taken = [second.take_batch(step) for step in (2, 3, 4)]
    assert [batch.group_ids for batch in taken] == [("0/p2", "0/p3"), ("0/p4", "0/p5"), ("1/p0", "1/p1")]


def test_dropped_groups_are_counted_as_such(make):
    pipeline, _, _, _ = make()
    counts = pipeline.settle(pipeline.take_batch(1), dropped="non_finite")
    assert counts == {"accepted": 2, "trained": 0, "dropped": 2, "quarantined": 0, "in_flight": 0}


def test_evaluation_is_not_in_the_ledger_and_leaves_failed_groups_out(make):
    pipeline, workers, _, prompts = make()
    workers.script[Verb.GENERATE, "evaluation/p0"] = [_data(), _data()]
    held_out = prompts.first(3)
    batch = pipeline.evaluate(0, held_out)
    assert batch.group_ids == ("evaluation/p1", "evaluation/p2")
    assert batch.quarantined == {"evaluation/p0": "generate: bad"}
    assert pipeline.counts()["accepted"] == 0
    assert pipeline.evaluate(1, held_out).group_ids == ("evaluation/p0", "evaluation/p1", "evaluation/p2")


def test_lost_weights_are_said_once_and_the_batch_waits_for_the_remedy(make):
    pipeline, workers, _, _ = make()
    core = pipeline._core
    infra = Failure(kind=FailureKind.INFRA, text="owner died")
    workers.script[Verb.LOAD, "rollout"] = [infra]
    core.ask(core.publish, Weights(incarnation=0, version=1), "lost").result()
    with pytest.raises(WeightsLostError, match="owner died"):
        pipeline.take_batch(1)
    core.ask(core.publish, Weights(incarnation=1, version=1), "found").result()
    assert pipeline.take_batch(1).group_ids == ("0/p0", "0/p1")
    assert {lease.incarnation for lease in workers.leases} == {1}


def test_what_ends_the_dispatcher_reaches_who_waits(make):
    pipeline, workers, _, _ = make(max_quarantined=0)
    workers.script[Verb.GENERATE, "0/p0"] = [_data("too long"), _data("too long")]
    with pytest.raises(DataError, match="0/p0 is one more: generate: too long"):
        pipeline.take_batch(1)
    pipeline, workers, _, _ = make()
    workers.script[Verb.GENERATE, "0/p0"] = [Failure(kind=FailureKind.DIED, text="gone")]
    with pytest.raises(FleetError, match=r"rollout-0\.0: gone"):
        pipeline.take_batch(1)


def test_a_mistake_in_the_thread_fails_whoever_waits_and_asks(make):
    pipeline, workers, journal, _ = make()
    workers.script[Verb.SCORE, "0/p0"] = [None]  # no pair: unpacking it fails inside the thread
    with pytest.raises(TypeError):
        pipeline.take_batch(1)
    with pytest.raises(TypeError):
        pipeline.counts()
    assert workers.closed
    assert journal.closed


def test_nobody_waits_for_ever_when_closing_fails_as_well(make, monkeypatch):
    pipeline, workers, journal, _ = make()
    workers.script[Verb.SCORE, "0/p0"] = [None]

    def unreachable():
        raise ConnectionError("Ray is gone")

    monkeypatch.setattr(workers, "close", unreachable)
    monkeypatch.setattr("threading.excepthook", lambda arguments: None)
    with pytest.raises(TypeError):
        pipeline.take_batch(1)
    with pytest.raises(TypeError):
        pipeline.counts()
    assert journal.closed


def test_what_happened_is_in_the_journal_soon_though_nothing_else_happens(make):
    pipeline, _, journal, _ = make()
    pipeline.take_batch(1)
    deadline = time.monotonic() + 10
    while not any(str(transition.state) == "batched" for transition in journal.transitions):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_closing_ends_the_thread_and_asking_after_it_is_an_error(make):
    pipeline, workers, journal, _ = make()
    pipeline.close()
    pipeline.close()
    assert workers.closed
    assert journal.closed
    assert not any(thread.name == "pipeline" and thread.is_alive() for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="pipeline has ended"):
        pipeline.counts()
