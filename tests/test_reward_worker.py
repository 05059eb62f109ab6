"""The judging process: one group in, SCORED and SAMPLES out."""

import json
import sys
import types

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoConfig, AutoModel

from actors.architecture import character_tokenizer
from actors.config import ArchitectureConfig, CharacterTokenizerConfig, PolicyConfig
from actors.policy import load_model, materialize
from actors.schema import ROLLOUTS, SchemaError, check
from reward.config import RewardConfig
from reward.errors import RewardError
from reward.model import RewardModel
from reward.reward_worker import RewardWorker
from reward.schema import SAMPLES, SCORED

LETTERS = "abcdefghijklmnopqrstuvwxyz "
RESPONSES = {"one": [0, 1, 28], "two": [2], "three": [3, 4, 5, 6]}
CHAT = json.dumps([{"role": "user", "content": "q"}])


def rules() -> None:
    module = types.ModuleType("worker_rules")

    def length(prompts, completions, **columns):
        return [float(len(completion)) for completion in completions]

    def only_three(prompts, completions, **columns):
        return [1.0 if completion == "three" else None for completion in completions]

    def topic(prompts, completions, topic, **columns):
        return [float(completion[0]["content"] == name) for completion, name in zip(completions, topic, strict=True)]

    module.length, module.only_three, module.topic = length, only_three, topic
    sys.modules["worker_rules"] = module


rules()


def rollouts(prompt: str = "abc", *, prompt_ids: tuple = (0, 1, 2), group: str = "0/p") -> pa.Table:
    rows = [
        {
            "prompt_id": "p",
            "prompt": prompt,
            "prompt_ids": list(prompt_ids),
            "extras": json.dumps({"topic": "two"}),
            "run_id": "run",
            "incarnation": 0,
            "group_id": group,
            "sample_index": index,
            "lease_id": 1,
            "response_ids": ids,
            "response_text": text,
            "logprobs": [-0.5] * len(ids),
            "policy_versions": [4, 5, 5, 6][: len(ids)],
            "loss_mask": [True, False, True, True][: len(ids)],
            "finish_reason": "eos",
        }
        for index, (text, ids) in enumerate(RESPONSES.items())
    ]
    return pa.Table.from_pylist(rows, schema=ROLLOUTS)


def worker(components: dict, *, policy_dir: str | None = None, temperature: float = 1.0, **settings) -> RewardWorker:
    return RewardWorker(
        reward=RewardConfig.model_validate({"components": components}),
        policy=policy(),
        policy_dir=policy_dir,
        temperature=temperature,
        device="cpu",
        num_threads=0,
        **settings,
    )


def policy() -> PolicyConfig:
    architecture = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    architecture |= {"num_key_value_heads": 2, "intermediate_size": 64, "initializer_range": 0.3}
    tokenizer = CharacterTokenizerConfig(characters=LETTERS)
    return PolicyConfig(model=ArchitectureConfig(architecture=architecture, tokenizer=tokenizer))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory) -> str:
    directory = str(tmp_path_factory.mktemp("reward"))
    tokenizer = character_tokenizer(LETTERS)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=len(tokenizer), **sizes)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    model = RewardModel.build(directory)
    model.save(directory + "/trained")
    return directory + "/trained"


def test_components_are_raw_scalars_and_absent_where_they_do_not_apply(reward_model):
    judge = worker(
        {
            "model": {"model": reward_model, "input": "response", "weight": 7.0, "normalize": "running"},
            "both": {"model": reward_model},
            "length": {"function": "worker_rules:length"},
            "rare": {"function": "worker_rules:only_three"},
        }
    )
    scored, samples = judge.score(rollouts())
    check(scored, SCORED, "test")
    check(samples, SAMPLES, "test")
    model = RewardModel.load(reward_model, device=torch.device("cpu"))
    texts = list(RESPONSES)
    components = [dict(row) for row in scored["components"].to_pylist()]
    assert [row["model"] for row in components] == pytest.approx(model.score(texts))
    assert [row["both"] for row in components] == pytest.approx(model.score(["abc" + text for text in texts]))
    assert [row["length"] for row in components] == [3.0, 3.0, 5.0]
    assert [row.get("rare") for row in components] == [None, None, 1.0]
    assert samples["components"].to_pylist() == scored["components"].to_pylist()
    assert scored.select(ROLLOUTS.names).equals(rollouts())
    assert scored["ref_logprobs"].null_count == samples["kl"].null_count == 3
    assert scored["score_std"].null_count == 3


def test_chat_prompts_reach_functions_as_messages_with_columns():
    scored, _ = worker({"topic": {"function": "worker_rules:topic"}}).score(rollouts(CHAT))
    assert [dict(row)["topic"] for row in scored["components"].to_pylist()] == [0.0, 1.0, 0.0]


def test_a_worker_says_in_process_lists_what_it_is():
    judges = {name: {"function": f"worker_rules:{name}"} for name in ("length", "topic")}
    assert repr(worker(judges)) == "RewardWorker(length, topic, cpu)"


def test_an_ensemble_records_its_disagreement(reward_model):
    component = {"model": reward_model, "ensemble": [reward_model], "input": "response"}
    scored, _ = worker({"model": component}).score(rollouts())
    assert scored["score_std"].to_pylist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reference_logprobs_and_kl_equal_a_plain_forward(tmp_path, temperature):
    directory = materialize(policy(), seed=3, cache_dir=str(tmp_path))
    judge = worker({"length": {"function": "worker_rules:length"}}, policy_dir=directory, temperature=temperature)
    scored, samples = judge.score(rollouts())
    model = load_model(directory, dtype=torch.float32, device=torch.device("cpu"))
    for ids, found, kl in zip(
        RESPONSES.values(), scored["ref_logprobs"].to_pylist(), samples["kl"].to_pylist(), strict=True
    ):
        with torch.no_grad():
            logits = model(torch.tensor([[0, 1, 2, *ids]])).logits[0, 2:-1] / temperature
        expected = logits.log_softmax(-1)[range(len(ids)), ids].numpy()
        assert found == pytest.approx(expected, abs=1e-4)
        mask = np.array([True, False, True, True][: len(ids)])
        assert kl == pytest.approx((-0.5 - expected)[mask].sum(), abs=1e-3), "tokens of the environment do not count"


def test_where_the_learner_has_the_reference_none_is_loaded_here(tmp_path):
    directory = materialize(policy(), seed=3, cache_dir=str(tmp_path))
    components = {"length": {"function": "worker_rules:length"}}
    scored, samples = worker(components, policy_dir=directory, has_reference=False).score(rollouts())
    assert scored["ref_logprobs"].null_count == samples["kl"].null_count == len(RESPONSES)


def test_counters_say_what_was_judged_and_where_the_time_went(reward_model, tmp_path):
    directory = materialize(policy(), seed=3, cache_dir=str(tmp_path))
    components = {"model": {"model": reward_model}, "length": {"function": "worker_rules:length"}}
    judge = worker(components, policy_dir=directory)
    before = judge.stats()
    assert before.pop("resident_bytes") > 2**20
    assert before == dict.fromkeys(
        ("num_groups", "num_sequences", "score_s_model", "score_s_length", "reference_s"), 0.0
    )
    judge.score(rollouts())
    judge.score(rollouts(group="0/q"))
    after = judge.stats()
    assert (after["num_groups"], after["num_sequences"]) == (2, 6)
    assert after["score_s_model"] > after["score_s_length"] > 0, "a forward takes longer than len"
    assert 0 < after["reference_s"] < 60


def test_samples_count_tokens_and_versions():
    _, samples = worker({"length": {"function": "worker_rules:length"}}).score(rollouts())
    assert samples["num_prompt_tokens"].to_pylist() == [3, 3, 3]
    assert samples["num_response_tokens"].to_pylist() == [3, 1, 4]
    assert samples["num_loss_tokens"].to_pylist() == [2, 1, 3]
    assert samples["oldest_version"].to_pylist() == [4, 4, 4]
    assert samples["newest_version"].to_pylist() == [5, 4, 6]


def test_a_group_gets_the_same_bits_again_and_after_others(reward_model, tmp_path):
    directory = materialize(policy(), seed=3, cache_dir=str(tmp_path))
    components = {"model": {"model": reward_model}}
    first = worker(components, policy_dir=directory).score(rollouts())
    other = worker(components, policy_dir=directory)
    other.score(rollouts("another prompt", prompt_ids=tuple(range(14)), group="0/q"))
    assert [table.equals(again) for table, again in zip(first, other.score(rollouts()), strict=True)] == [True, True]


def test_a_response_that_no_component_judges_is_an_error():
    with pytest.raises(RewardError, match="one must apply to each response, got none for 0"):
        worker({"rare": {"function": "worker_rules:only_three"}}).score(rollouts())


def test_a_judge_that_is_away_is_no_fault_of_the_prompt(monkeypatch):
    def away(prompts, completions, **columns):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(sys.modules["worker_rules"], "away", away, raising=False)
    judge = worker({"length": {"function": "worker_rules:length"}, "far": {"function": "worker_rules:away"}})
    with pytest.raises(ConnectionError, match=r"component 'far', prompt 'p': .*Connection refused"):
        judge.score(rollouts())


def test_a_reward_model_that_returns_nan_is_an_error(reward_model, tmp_path):
    model = RewardModel.load(reward_model, device=torch.device("cpu"))
    model.gain.fill_(float("nan"))
    model.save(str(tmp_path / "broken"))
    with pytest.raises(RewardError, match=r"'judge', prompt 'p': a score must be finite, got nan"):
        worker({"judge": {"model": str(tmp_path / "broken")}}).score(rollouts())


def test_judging_begins_with_its_fault_point(monkeypatch):
    reached = []
    monkeypatch.setattr("reward.reward_worker.fault", reached.append)
    with pytest.raises(SchemaError):
        worker({"length": {"function": "worker_rules:length"}}).score(rollouts().drop_columns(["loss_mask"]))
    assert reached == ["reward.score"]


def test_the_door():
    judge = worker({"length": {"function": "worker_rules:length"}})
    assert judge.ping() == "ready"
    with pytest.raises(SchemaError, match="must be one group, got 2"):
        judge.score(pa.concat_tables([rollouts(), rollouts(group="1/p")]))
    with pytest.raises(SchemaError, match="loss_mask"):
        judge.score(rollouts().drop_columns(["loss_mask"]))
