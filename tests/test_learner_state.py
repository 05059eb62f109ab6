import errno
import json
import os
import shutil
import threading
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.engine import Request, SamplingParams
from actors.scoring import reference_logprobs
from actors.torch_engine import TorchEngine
from actors.weights import InProcessTransport, receive
from learner import state as learner_state
from learner.config import LoraConfig
from learner.learner import LearnerRank
from learner.state import StateError
from tests.learner_pair import RESUMES, WORLD_SIZE, Pair, pair_results, published
from tests.learner_toys import (
    TEMPERATURE,
    learner_config,
    learner_rank,
    parameters,
    toy_batch,
    toy_directory,
    toy_model,
)

ENGINES: dict[str, dict[str, Any]] = {
    "local": {},
    "local, separate critic": {"critic": "separate"},
    "local, lora": {"lora": LoraConfig(rank=4, alpha=8.0)},
    "zero 1": {"backend": "zero", "zero_stage": 1},
    "zero 2": {"backend": "zero", "zero_stage": 2},
    "zero 3": {"backend": "zero", "zero_stage": 3},
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return toy_directory(tmp_path_factory.mktemp("toy"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return pair_results()


class ToyTokenizer:
    """The engine asks for text; here it does not matter."""

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))


def learn(learner: LearnerRank, toy: str, config: Any, steps: range) -> LearnerRank:
    for step in steps:
        batch = toy_batch(toy, config, step=step)
        learner.step(batch.tables, batch.plan)
    return learner


def save(learner: LearnerRank, directory: Any) -> list[str]:
    learner.begin_save(str(directory))
    return learner.finish_save()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ENGINES)
def test_four_steps_are_two_and_two(toy, tmp_path, name):
    config = learner_config(**ENGINES[name])
    whole = learn(learner_rank(toy, config), toy, config, range(1, 5))
    half = learn(learner_rank(toy, config), toy, config, range(1, 3))
    files = save(half, tmp_path)
    assert sorted(files) == sorted(path.name for path in tmp_path.iterdir())
    resumed = learner_rank(toy, config)
    resumed.load_state(str(tmp_path))
    assert resumed.ping() == half.ping() == 8
    learn(resumed, toy, config, range(3, 5))
    assert same(parameters(resumed), parameters(whole))


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_the_comparison_finds_a_lost_moment(toy, tmp_path, key, monkeypatch):
    config = learner_config()
    half = learn(learner_rank(toy, config), toy, config, range(1, 3))
    save(half, tmp_path)
    resumed = learner_rank(toy, config)
    resumed.load_state(str(tmp_path))
    for state in resumed._networks.policy._optimizer.state.values():
        state[key].zero_()
    assert not same(
        parameters(learn(resumed, toy, config, range(3, 4))), parameters(learn(half, toy, config, range(3, 4)))
    )


@pytest.mark.parametrize(("saved_by", "resumed_by"), [("local", "zero 3"), ("zero 3", "local"), ("zero 1", "zero 2")])
def test_a_state_resumes_at_any_stage(toy, tmp_path, saved_by, resumed_by):
    first_config, second_config = learner_config(**ENGINES[saved_by]), learner_config(**ENGINES[resumed_by])
    first = learn(learner_rank(toy, first_config), toy, first_config, range(1, 3))
    save(first, tmp_path)
    second = learner_rank(toy, second_config)
    second.load_state(str(tmp_path))
    assert same(parameters(first), parameters(second))  # what was saved, to the bit
    learn(first, toy, first_config, range(3, 4)), learn(second, toy, second_config, range(3, 4))
    after = zip(parameters(first).values(), parameters(second).values(), strict=True)
    assert max(float((a - b).abs().max()) for a, b in after) < 1e-6


def test_a_state_is_full_tensors_without_pickles(toy, tmp_path):
    config = learner_config()
    learner = learner_rank(toy, config)
    save(learner, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"learner.json", "learner-00001-of-00001.safetensors"}
    saved = load_file(tmp_path / "learner-00001-of-00001.safetensors")
    shape = saved["policy/policy.model.embed_tokens.weight/exp_avg_sq"].shape
    assert shape == (61, 32)
    assert not any("lm_head" in name for name in saved)  # tied to the embedding, saved once


def test_a_state_of_another_learner_is_refused(toy, tmp_path):
    save(learner_rank(toy, learner_config()), tmp_path)
    with pytest.raises(StateError, match=r"must be of \['critic', 'policy'\]"):
        learner_rank(toy, learner_config(critic="separate")).load_state(str(tmp_path))
    with pytest.raises(StateError, match="lora_A"):
        learner_rank(toy, learner_config(lora=LoraConfig(rank=4, alpha=8.0))).load_state(str(tmp_path))
    index = json.loads((tmp_path / "learner.json").read_text())
    (tmp_path / "learner.json").write_text(json.dumps(index | {"format": 99}))
    with pytest.raises(StateError, match="format must be 2"):
        learner_rank(toy, learner_config()).load_state(str(tmp_path))


def test_two_ranks_state_resumes_in_one_process(pair):
    """Saved by two ranks at stage 3; one process goes on as they did."""
    result = pair.variant("stage 3")
    assert result["files"] == ["learner-00001-of-00002.safetensors", "learner.json"]
    config = learner_config()
    learner = learner_rank(pair.toy, config)
    learner.load_state(str(pair.directory / "state of stage 3"))
    assert same(parameters(learner), result["parameters"])
    after = parameters(learn(learner, pair.toy, config, range(4, 5)))
    assert max(float((after[name] - result["next"][name]).abs().max()) for name in after) < 1e-6


@pytest.mark.parametrize("name", RESUMES)
def test_two_ranks_go_on_from_any_state(pair, name):
    """Saved while the next step was made, by two ranks at some stage or by one process; resumed by two ranks."""
    saved, stage = RESUMES[name]
    for rank in range(WORLD_SIZE):
        found = pair.ranks[rank]["resumed"][name]
        before = pair.one if saved == "one" else pair.variant(saved, rank)["next"]
        if saved == f"stage {stage}":
            assert same(found["next"], before)
            assert same(found["loaded"], pair.variant(saved, rank)["parameters"])
        assert max(float((found["next"][key] - before[key]).abs().max()) for key in before) < 1e-6
        assert not same(found["next"], found["loaded"])


def test_each_rank_has_its_own_random_numbers_back(pair):
    for name, (saved, _) in RESUMES.items():
        found = [rank["resumed"][name]["random"] for rank in pair.ranks]
        if saved == "one":  # the second rank had none
            assert torch.equal(*found)
        else:
            assert all(found[rank].equal(pair.variant(saved, rank)["random"]) for rank in range(WORLD_SIZE))


def test_the_comparison_finds_a_rank_with_anothers_random_numbers(pair):
    found = [rank["one random state"] for rank in pair.ranks]
    assert found[0].equal(pair.variant("stage 2", 0)["random"])
    assert not found[1].equal(pair.variant("stage 2", 1)["random"])


def state_of(learner: LearnerRank) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value.clone()
        for name, tensors in learner._networks.policy.full_state()
        for key, value in tensors.items()
    }


@pytest.mark.parametrize("is_live", [False, True], ids=["copies", "planted bug: no copies"])
def test_steps_made_while_a_state_is_written_are_not_in_it(toy, tmp_path, monkeypatch, is_live):
    learner = learn(learner_rank(toy, learner_config()), toy, learner_config(), range(1, 3))
    is_learnt = threading.Event()
    monkeypatch.setattr("learner.state.fault", lambda name, rank: name != "learner.write" or is_learnt.wait(60))
    with monkeypatch.context() as bug:
        if is_live:
            bug.setattr(torch.Tensor, "clone", lambda tensor: tensor)
        learner.begin_save(str(tmp_path))
    before = None if is_live else state_of(learner)
    learn(learner, toy, learner_config(), range(3, 4))
    is_learnt.set()
    learner.finish_save()
    resumed = learner_rank(toy, learner_config())
    resumed.load_state(str(tmp_path))
    assert same(state_of(resumed), state_of(learner)) == is_live
    assert before is None or same(state_of(resumed), before)


def test_what_writing_meets_is_said_when_the_save_is_finished(toy, tmp_path, monkeypatch):
    learner = learn(learner_rank(toy, learner_config()), toy, learner_config(), range(1, 2))
    before = state_of(learner)

    def fault(name: str, rank: int) -> None:
        if name == "learner.write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("learner.state.fault", fault)
        learner.begin_save(str(tmp_path))
        with pytest.raises(OSError, match="No space left") as caught:
            learner.finish_save()
    assert caught.value.errno == errno.ENOSPC
    assert same(state_of(learner), before)
    with pytest.raises(OSError, match="No such file") as caught:
        save(learner, tmp_path / "missing")
    assert caught.value.errno == errno.ENOENT
    save(learner, tmp_path)  # over the torn file
    resumed = learner_rank(toy, learner_config())
    resumed.load_state(str(tmp_path))
    assert same(state_of(resumed), before)


def test_one_save_at_a_time(toy, tmp_path):
    learner = learner_rank(toy, learner_config())
    with pytest.raises(StateError, match="must be begun before it is finished"):
        learner.finish_save()
    learner.begin_save(str(tmp_path))
    with pytest.raises(StateError, match="must be finished before the next is begun"):
        learner.begin_save(str(tmp_path))
    assert learner.finish_save()
    assert save(learner, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -0.0, 1e-45])
def test_every_bit_is_written(tmp_path, value):
    """Values that text, or a comparison of numbers, would lose."""
    tensors = {"a": torch.full((3, 5), value), "scalar": torch.tensor(value), "rng/torch/0": torch.get_rng_state()}
    share = learner_state.Share(rank=0, num_ranks=1, tensors=tensors, num_updates={})
    name, _ = learner_state.write(share, str(tmp_path))
    found = load_file(tmp_path / name)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert found[key].shape == tensor.shape
        assert found[key].numpy().tobytes() == tensor.numpy().tobytes()


def test_both_ranks_wrote_a_share(pair):
    sizes = [path.stat().st_size for path in (pair.directory / "state of stage 3").glob("*.safetensors")]
    assert len(sizes) == 2
    assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, alpha=8.0)])
def test_an_export_is_what_was_learnt(tmp_path, model_type, lora):
    toy = toy_directory(tmp_path / "toy", model_type)
    (tmp_path / "toy" / "tokenizer.json").write_text("{}")
    config = learner_config(lora=lora)
    learner = learn(learner_rank(toy, config), toy, config, range(1, 3))
    learner.export_policy(str(tmp_path / "export"))
    assert (tmp_path / "export" / "tokenizer.json").read_text() == "{}"
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert not any("lora" in name or "value_head" in name for name in exported.state_dict())
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        expected = learner._networks.module.policy(input_ids=ids).logits
        assert torch.allclose(exported(input_ids=ids).logits, expected, atol=1e-5)
        assert not torch.allclose(toy_model(model_type)(input_ids=ids).logits, expected, atol=1e-2)


@pytest.mark.parametrize("former", ["none", "policy"])
def test_an_export_that_fails_leaves_what_was_there_and_the_next_is_whole(toy, tmp_path, monkeypatch, former):
    learner = learner_rank(toy, learner_config())
    target = tmp_path / "run" / "export"
    if former == "policy":
        learner.export_policy(str(target))
        (target / "of the former").write_text("x")
    before = sorted(os.listdir(target)) if target.exists() else None
    (tmp_path / "run").mkdir(exist_ok=True)

    def half(source, copy):
        with open(copy, "w") as file:
            file.write("half")
        raise OSError(errno.ENOSPC, "no space left on device")

    (tmp_path / "toy").mkdir()
    for name in os.listdir(toy):
        shutil.copyfile(os.path.join(toy, name), tmp_path / "toy" / name)
    (tmp_path / "toy" / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(learner, "_model_dir", str(tmp_path / "toy"))
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", half)
        with pytest.raises(OSError, match="no space left"):
            learner.export_policy(str(target))
    assert (sorted(os.listdir(target)) if target.exists() else None) == before
    learner.export_policy(str(target))
    assert os.listdir(tmp_path / "run") == ["export"], "no temporary names are left"
    assert (target / "tokenizer.json").read_text() == "{}"
    assert not (target / "of the former").exists(), "whole, not mixed"


def test_an_export_replaces_nothing_but_a_policy(toy, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match=r"must be empty or hold a policy's config\.json"):
        learner_rank(toy, learner_config()).export_policy(str(tmp_path))
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_an_export_keeps_half_precision_and_ties(tmp_path):
    toy = toy_directory(tmp_path / "toy", tie_word_embeddings=True)
    learner = learner_rank(toy, learner_config(), dtype="bfloat16")
    learner.export_policy(str(tmp_path / "export"))
    saved = load_file(tmp_path / "export" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert exported.lm_head.weight is exported.model.embed_tokens.weight


@pytest.mark.parametrize("settings", [{}, {"backend": "zero", "zero_stage": 3}], ids=str)
def test_published_weights_are_the_learners_to_the_bit(toy, settings):
    config = learner_config(**settings)
    learner = learn(learner_rank(toy, config), toy, config, range(1, 2))
    found = published(learner)
    weights = {name.removeprefix("policy/policy."): value for name, value in parameters(learner).items()}
    assert found.keys() == {name for name in weights if "value_head" not in name}
    assert "lm_head.weight" not in found  # tied: published once, as the embedding
    assert all(torch.equal(found[name], weights[name]) for name in found)


def test_an_engine_takes_a_publication_and_samples_what_the_learner_scores(toy):
    """Publish, receive into a real engine, generate: the engine's recorded log-probs are the learner's."""
    config = learner_config()
    learner = learn(learner_rank(toy, config), toy, config, range(1, 3))
    engine = TorchEngine(toy_model(tie_word_embeddings=True), ToyTokenizer(), max_rows=4, eos_ids=frozenset({2}))
    receive(learner.publish(version=5, incarnation=0), InProcessTransport(), engine)
    sampling = SamplingParams(max_new_tokens=8, temperature=TEMPERATURE)
    engine.submit([Request(request_id="a", prompt_ids=[3, 4, 5], num_samples=4, seed=1, sampling=sampling)])
    found: list[Any] = []
    while engine.has_work:
        found += engine.step()
    policy, responses = learner._networks.module.policy, [completion.response_ids for completion in found]
    expected = reference_logprobs(policy, [3, 4, 5], responses, temperature=TEMPERATURE)
    for completion, logprobs in zip(found, expected, strict=True):
        assert set(completion.policy_versions.tolist()) == {5}
        assert abs(completion.logprobs - logprobs).max() < 1e-4
    before = reference_logprobs(toy_model(tie_word_embeddings=True), [3, 4, 5], responses, temperature=TEMPERATURE)
    assert max(abs(b - e).max() for b, e in zip(before, expected, strict=True)) > 1e-2  # the weights did change


def test_two_ranks_publish_and_export_what_they_learnt(pair):
    assert pair.variant("stage 3", 1)["published"] is None
    result = pair.variant("stage 3")
    exported = AutoModelForCausalLM.from_pretrained(pair.directory / "export").state_dict()
    assert result["published"].keys() == exported.keys()
    for name, tensor in result["published"].items():
        assert torch.equal(tensor, result["parameters"][f"policy/policy.{name}"])
        assert torch.equal(tensor, exported[name])


def test_adapters_are_published_merged(pair):
    merged = pair.variant("lora")["published"]
    base = AutoModelForCausalLM.from_pretrained(pair.toy).state_dict()
    assert merged.keys() == base.keys()
    trained = pair.variant("lora")["parameters"]
    name = "model.layers.1.mlp.down_proj"
    down, up = (trained[f"policy/policy.{name}.lora_{part}.default.weight"] for part in "AB")
    expected = base[f"{name}.weight"] + (8.0 / 4.0) * up @ down
    assert torch.allclose(merged[f"{name}.weight"], expected, atol=1e-6)
    assert not torch.allclose(merged[f"{name}.weight"], base[f"{name}.weight"], atol=1e-4)
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"])


def test_only_the_newest_publication_is_kept_alive(toy):
    learner = learner_rank(toy, learner_config())
    learner.publish(version=0, incarnation=0)
    newest = learner.publish(version=1, incarnation=2)
    assert (newest.version, newest.incarnation) == (1, 2)
    assert learner._publisher._newest is newest
