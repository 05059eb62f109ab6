"""Offline learning from file to measured policy: what is learnt, what is written, and that it is repeatable."""

import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.config import ArchitectureConfig, CharacterTokenizerConfig, PolicyConfig, PromptsConfig
from actors.guidance import ValueGuidance
from actors.policy import load_model, materialize
from actors.rows import PromptGroup
from actors.schema import check
from actors.scoring import reference_logprobs, scorer_of
from learner.config import DataConfig, OptimizerConfig, TrainingConfig
from learner.offline import OfflineResult, train
from learner.offline_config import DPOConfig, OfflineConfig, OfflineEvaluationConfig, ScoreConfig
from learner.offline_evaluation import EVALUATION_FILE, Evaluation
from learner.value_config import ILQLConfig, QLearningConfig
from reward.config import ComponentConfig, RewardConfig
from reward.schema import SCORED

CPU = torch.device("cpu")
POLICY = PolicyConfig(
    model=ArchitectureConfig(
        architecture={"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16},
        tokenizer=CharacterTokenizerConfig(characters="abcdef"),
    )
)
PREFERENCES = [{"prompt": p, "chosen": "a" + p, "rejected": r} for p in "bcd" for r in ("ef", "fe", "e")]
RATINGS = [
    {"prompt": p, "completion": text, "rating": r} for p in "bcd" for text, r in (("a", 1.0), ("e", 0.0), ("f", 0.0))
]
A, E, F, EOS = 0, 4, 5, 7


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return materialize(POLICY, seed=0, cache_dir=str(tmp_path_factory.mktemp("cache")))


def _config(tmp_path, rows, **sections) -> OfflineConfig:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    training = TrainingConfig(epochs=20, batch_size=9, max_tokens=12, optimizer=OptimizerConfig(learning_rate=1e-2))
    defaults = {"output": str(tmp_path / "out"), "data": DataConfig(path=str(path)), "training": training}
    return OfflineConfig(policy=POLICY, **{**defaults, **sections})


def _train(config: OfflineConfig, source: str, tmp_path) -> OfflineResult:
    return train(config, source=source, cache_dir=str(tmp_path))


def _probabilities(directory: str, prompt: int) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        return model(torch.tensor([[prompt]])).logits[0, -1].softmax(-1)


def test_dpo_learns_what_is_preferred(tmp_path, source):
    result = _train(_config(tmp_path, PREFERENCES), source, tmp_path)
    assert result.losses[0] == pytest.approx(np.log(2), abs=1e-5)
    assert result.losses[-1] < 0.2
    assert result.metrics["num_pairs"] == 9
    assert result.metrics["implicit_accuracy"] == 1.0
    for prompt in (1, 2, 3):
        before, after = (_probabilities(directory, prompt) for directory in (source, result.directory))
        assert after[A] > before[A]
        assert after[E] < before[E]
        assert after[F] < before[F]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result.metrics
    assert os.path.isfile(tmp_path / "out" / "training.yaml")
    with open(tmp_path / "out" / "metrics.jsonl") as file:
        journal = [json.loads(line) for line in file]
    assert [row["loss"] for row in journal] == list(result.losses)
    assert journal[0]["implicit_margin"] == pytest.approx(0.0, abs=1e-5)


def test_a_swapped_preference_is_learnt_the_other_way(tmp_path, source):
    """Planted bug: data in which the columns are swapped must not pass for the data above."""
    rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in PREFERENCES]
    result = _train(_config(tmp_path, rows), source, tmp_path)
    assert _probabilities(result.directory, 1)[A] < _probabilities(source, 1)[A]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path, source):
    def weights(seed: int) -> dict[str, torch.Tensor]:
        training = TrainingConfig(epochs=2, batch_size=2, optimizer=OptimizerConfig(learning_rate=1e-2), seed=seed)
        config = _config(tmp_path, RATINGS, algorithm=DPOConfig(pairs_per_prompt=1), training=training)
        return load_file(os.path.join(_train(config, source, tmp_path).directory, "model.safetensors"))

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_ratings_become_pairs_within_a_prompt(tmp_path, source):
    result = _train(_config(tmp_path, RATINGS), source, tmp_path)
    metrics = result.metrics
    assert (metrics["num_pairs"], metrics["num_ties"]) == (6, 3)
    assert metrics["data_score_mean"] == pytest.approx(1 / 3)
    limited = _config(tmp_path, RATINGS, data=DataConfig(path=str(tmp_path / "data.jsonl"), limit=4))
    assert _train(limited, source, tmp_path).metrics["num_pairs"] == 4


@pytest.mark.parametrize(
    ("rows", "sections", "reason"),
    [
        (
            PREFERENCES,
            {"algorithm": DPOConfig(pairs_per_prompt=3)},
            "pairs_per_prompt must be left out for preferences",
        ),
        (RATINGS[1:3], {}, "two responses with different scores to one prompt, got none among 2 rows"),
    ],
)
def test_what_would_be_ignored_or_cannot_be_learnt_is_refused(tmp_path, source, rows, sections, reason):
    with pytest.raises(ValueError, match=reason):
        _train(_config(tmp_path, rows, **sections), source, tmp_path)
    assert not os.path.exists(tmp_path / "out")


def _evaluation(tmp_path, **settings) -> OfflineEvaluationConfig:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt, "id": prompt}) for prompt in "bcd"))
    reward = RewardConfig(components={"share": ComponentConfig(function="tests.rules:share_of_a")})
    defaults = {"num_prompts": 3, "samples_per_prompt": 5, "max_new_tokens": 4, "max_rows": 8}
    prompts = PromptsConfig(path=str(path))
    return OfflineEvaluationConfig(prompts=prompts, reward=reward, **{**defaults, **settings})


def _evaluate(tmp_path, source, directory, *, is_guided=False, **settings):
    config = _evaluation(tmp_path, **settings)
    metrics = Evaluation(config, POLICY, source=source, cache_dir=str(tmp_path)).run(directory, is_guided=is_guided)
    table = pq.read_table(os.path.join(directory, EVALUATION_FILE))
    return metrics, check(table, SCORED, "evaluation").to_pylist()


@pytest.mark.parametrize("algorithm", [ILQLConfig(guidance=2.0), QLearningConfig(guidance=2.0)], ids=lambda a: a.name)
def test_values_are_learnt_and_guide_the_evaluation(tmp_path, source, algorithm):
    config = _config(tmp_path, RATINGS, algorithm=algorithm, score=ScoreConfig(standardize=True))
    result = _train(config, source, tmp_path)
    assert result.metrics == {"num_trajectories": 9, "data_score_mean": pytest.approx(1 / 3)}
    directory = result.directory
    metrics, rows = _evaluate(tmp_path, source, directory, is_guided=True)
    model, reference = (load_model(path, dtype=torch.float32, device=CPU) for path in (directory, source))
    heads = ValueGuidance.load(directory, device=CPU)
    kl, shares = [], []
    for row in rows:
        ids, prompt = row["response_ids"], row["prompt_ids"]
        scorer = scorer_of(model)
        scores = scorer.plain(scorer.row([PromptGroup(prompt_ids=prompt, responses=[ids])]), lambda logits, *_: logits)
        guided = heads(scores.tokens, scores.states[:-1], [""] * len(ids)).log_softmax(-1)
        expected = guided.gather(-1, torch.tensor(ids)[:, None])[:, 0].detach().numpy()
        plain = scores.tokens.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].detach().numpy()
        assert row["logprobs"] == pytest.approx(expected, abs=1e-4), "of the policy that was sampled, guidance included"
        assert np.abs(plain - expected).max() > 1e-3, "the plain policy is another one"
        (theirs,) = reference_logprobs(reference, prompt, [ids], temperature=1.0)
        assert row["ref_logprobs"] == pytest.approx(theirs, abs=1e-5), "of the starting policy"
        kl.append(float(np.sum(row["logprobs"]) - np.sum(theirs)))
        shares.append(row["response_text"].count("a") / max(1, len(row["response_text"])))
    assert len(rows) == 15
    assert metrics["kl"] == pytest.approx(np.mean(kl), abs=1e-4)
    assert metrics["share_mean"] == metrics["score_mean"] == pytest.approx(np.mean(shares), abs=1e-6)


def test_an_evaluation_is_repeatable_and_its_rows_are_data_for_the_next_algorithm(tmp_path, source):
    directory = _train(_config(tmp_path, RATINGS), source, tmp_path).directory
    _, other = _evaluate(tmp_path, source, directory, seed=1)
    first, rows = _evaluate(tmp_path, source, directory)
    again, same = _evaluate(tmp_path, source, directory)
    assert (first, rows) == (again, same)
    assert rows != other
    rollouts = DataConfig(path=os.path.join(directory, EVALUATION_FILE))
    for algorithm in (DPOConfig(), ILQLConfig()):
        config = _config(tmp_path, [], data=rollouts, algorithm=algorithm, output=str(tmp_path / "next"))
        result = _train(config, source, tmp_path)
        assert result.quarantined == ()
        assert result.metrics["data_score_mean"] == pytest.approx(first["score_mean"], abs=1e-6)
    assert result.metrics["num_trajectories"] == 15


def test_prompts_that_leave_no_room_are_refused_before_training(tmp_path, source):
    with pytest.raises(ValueError, match=r"at most 16, the policy's positions, got 1 \+ 16"):
        _evaluate(tmp_path, source, source, max_new_tokens=16)
