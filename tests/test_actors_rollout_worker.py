import asyncio

import pyarrow as pa
import pytest
import torch

from actors.config import ArchitectureConfig, CharacterTokenizerConfig, PolicyConfig, RolloutsConfig
from actors.engine import SamplingParams
from actors.policy import load_model, materialize
from actors.rollout_worker import Lease, RolloutError, RolloutWorker
from actors.schema import PROMPTS, ROLLOUTS, check
from actors.scoring import reference_logprobs
from actors.weights import Bucket, InProcessTransport, Publication, WeightError, pack_bucket

POLICY = PolicyConfig(
    model=ArchitectureConfig(
        architecture={"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "initializer_range": 0.2},
        tokenizer=CharacterTokenizerConfig(characters="abcdefgh"),
    )
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return materialize(POLICY, seed=0, cache_dir=str(tmp_path_factory.mktemp("models")))


def _worker(model_dir, max_rows=8):
    return RolloutWorker(
        model_dir=model_dir,
        policy=POLICY,
        rollouts=RolloutsConfig(max_rows=max_rows),
        transport=InProcessTransport(),
        run_id="test",
        seed=0,
        device="cpu",
        num_threads=1,
    )


def _publication(model_dir, version, scale=1.0):
    model = load_model(model_dir, dtype=torch.float32, device=torch.device("cpu"))
    buffer, entries = pack_bucket([(name, p.detach() * scale) for name, p in model.named_parameters()])
    bucket = Bucket(entries=entries, num_bytes=buffer.nbytes, handle=buffer)
    return Publication(version=version, incarnation=0, buckets=(bucket,))


def _prompt(name, ids):
    row = {"prompt_id": [name], "prompt": ["x"], "prompt_ids": [ids], "extras": ["{}"]}
    return pa.table(row, schema=PROMPTS)


def _lease(name, number=1, samples=4, length=12):
    return Lease(
        lease_id=number,
        epoch=0,
        group_id=f"0/{name}",
        incarnation=0,
        num_samples=samples,
        sampling=SamplingParams(max_new_tokens=length),
        seed=3,
    )


PROMPTS_BY_NAME = {"p": [0, 1, 2], "q": [3], "r": [4, 5, 6, 7, 0], "s": [1, 1]}


async def _generate(worker, names, lease=_lease):
    calls = [worker.generate(_prompt(name, PROMPTS_BY_NAME[name]), lease(name)) for name in names]
    return [table for table, _ in await asyncio.gather(*calls)]


def test_groups_have_the_schema_and_the_learners_logprobs(model_dir):
    async def scenario():
        worker = _worker(model_dir)
        await worker.update_weights(_publication(model_dir, version=5))
        assert await worker.ping() == 5
        tables = await _generate(worker, "pqrs")
        await worker.close()
        return tables

    model = load_model(model_dir, dtype=torch.float32, device=torch.device("cpu"))
    for name, table in zip("pqrs", asyncio.run(scenario()), strict=True):
        rows = check(table, ROLLOUTS, "test").to_pylist()
        assert [(row["group_id"], row["sample_index"], row["lease_id"]) for row in rows] == [
            (f"0/{name}", index, 1) for index in range(4)
        ]
        responses = [row["response_ids"] for row in rows]
        expected = reference_logprobs(model, PROMPTS_BY_NAME[name], responses, temperature=1.0)
        for row, logprobs in zip(rows, expected, strict=True):
            assert row["logprobs"] == pytest.approx(logprobs.tolist(), abs=1e-4)
            assert set(row["policy_versions"]) == {5}
            assert all(row["loss_mask"])


def test_a_retried_lease_gives_the_same_bits_in_other_company_on_another_worker(model_dir):
    async def scenario(names, max_rows):
        worker = _worker(model_dir, max_rows)
        await worker.update_weights(_publication(model_dir, version=0))
        tables = await _generate(worker, names)
        await worker.close()
        return dict(zip(names, tables, strict=True))

    together, alone = asyncio.run(scenario("pqrs", 8)), asyncio.run(scenario("r", 4))
    for column in ("response_ids", "logprobs", "finish_reason"):
        assert together["r"][column].to_pylist() == alone["r"][column].to_pylist()
    assert together["r"]["response_ids"].to_pylist() != together["p"]["response_ids"].to_pylist()


def test_an_update_waits_for_groups_in_flight_and_later_groups_wait_for_it(model_dir):
    async def scenario():
        worker = _worker(model_dir)
        await worker.update_weights(_publication(model_dir, version=1))
        before = asyncio.ensure_future(_generate(worker, "pq"))
        await asyncio.sleep(0)
        update = asyncio.ensure_future(worker.update_weights(_publication(model_dir, version=2, scale=1.1)))
        await update
        after = await _generate(worker, "rs")
        tables = await before, after
        await worker.close()
        return tables

    before, after = asyncio.run(scenario())
    versions = [
        {v for t in tables for row in t["policy_versions"].to_pylist() for v in row} for tables in (before, after)
    ]
    assert versions == [{1}, {2}]


def test_a_bad_request_fails_alone_and_a_bad_publication_names_the_tensor(model_dir):
    async def scenario():
        worker = _worker(model_dir)
        await worker.update_weights(_publication(model_dir, version=1))
        good = asyncio.ensure_future(_generate(worker, "p"))
        with pytest.raises(ValueError, match="0/q"):
            await _generate(worker, "q", lease=lambda name: _lease(name, length=10**6))
        assert len(await good) == 1
        damaged = _publication(model_dir, version=2)
        damaged.buckets[0].handle[100] ^= 1
        with pytest.raises((WeightError, RolloutError), match="must have fingerprint"):
            await worker.update_weights(damaged)
        await worker.close()

    asyncio.run(scenario())
