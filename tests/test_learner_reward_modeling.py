"""Reward-model training: planted preferences are found, held-out figures are honest."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from transformers import AutoConfig, AutoModel

from actors.architecture import character_tokenizer
from learner import judgements
from learner.config import DataConfig, OptimizerConfig, RewardModelConfig, TrainingConfig
from learner.judgements import Preference, Rating, split
from learner.rating_metrics import pairwise_accuracy, pearson, preference_accuracy
from learner.reward_modeling import train
from learner.reward_objectives import BradleyTerry, Regression
from reward.model import RewardModel

CPU = torch.device("cpu")
RANDOM = np.random.default_rng(7)
TEXTS = ["".join(RANDOM.choice(list("abcdef"), size=RANDOM.integers(3, 12))) for _ in range(400)]


def liking(text: str) -> float:
    """The planted preference: linear in what the trunk can count."""
    return 3.0 + 4.0 * (text.count("a") - text.count("b")) / len(text)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory) -> str:
    directory = str(tmp_path_factory.mktemp("trunk"))
    tokenizer = character_tokenizer("abcdef? ")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", vocab_size=len(tokenizer), initializer_range=0.2, **sizes)
    AutoModel.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def config(tmp_path, trunk: str, rows: list[dict], **settings: object) -> RewardModelConfig:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    optimizer = OptimizerConfig(learning_rate=2e-3, schedule="linear", warmup_steps=5)
    return RewardModelConfig(
        output=str(tmp_path / "rm"),
        model=trunk,
        data=DataConfig(path=str(path)),
        training=TrainingConfig(epochs=6, batch_size=16, optimizer=optimizer, max_tokens=32),
        head_learning_rate=1e-2,
        held_out_fraction=0.15,
        **settings,
    )


def test_a_planted_rating_is_found_and_the_result_is_normalised(tmp_path, trunk):
    rows = [{"text": text, "rating": liking(text)} for text in TEXTS]
    result = train(config(tmp_path, trunk, rows, objective="regression"), cache_dir="unused")
    metrics = result.metrics
    assert metrics["test_pearson"] > 0.95
    assert metrics["test_pairwise_accuracy"] > 0.97
    assert metrics["test_pairwise_accuracy_low"] > metrics["test_length_only_accuracy_high"]
    assert result.num_train + metrics["validation_num_rows"] + metrics["test_num_rows"] == len(TEXTS)
    model = RewardModel.load(result.directory, device=CPU)
    parts = split([Rating(text=text, rating=0.0) for text in TEXTS], held_out_fraction=0.15, seed=0)
    scores = np.array([score for rating in parts.train for score in model.score([rating.text])])
    assert scores.mean() == pytest.approx(0.0, abs=1e-3)
    assert scores.std() == pytest.approx(1.0, abs=1e-3)
    with open(os.path.join(result.directory, "metrics.json")) as file:
        assert json.load(file) == result.metrics
    before, after = (load_file(os.path.join(d, "model.safetensors")) for d in (trunk, result.directory))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "embeddings.word_embeddings.weight" not in moved
    assert "encoder.layer.0.attention.self.query.weight" in moved


def test_a_planted_preference_is_found(tmp_path, trunk):
    pairs = [sorted((text, TEXTS[index - by]), key=liking) for by in (1, 2, 3) for index, text in enumerate(TEXTS)]
    rows = [
        {"prompt": "abcdef"[index % 6] * (1 + index % 7) + "?", "chosen": high, "rejected": low}
        for index, (low, high) in enumerate(pairs)
        if liking(high) > liking(low) + 0.5
    ]
    result = train(config(tmp_path, trunk, rows, objective="bradley_terry"), cache_dir="unused")
    assert result.metrics["test_pairwise_accuracy"] > 0.9
    assert "test_pearson" not in result.metrics


def test_ratings_that_cannot_be_measured_are_refused_before_training(tmp_path, trunk):
    rows = [{"text": text, "rating": 3.0} for text in TEXTS]
    with pytest.raises(ValueError, match=r"more than pair_margin apart, got 3\.0 to 3\.0"):
        train(config(tmp_path, trunk, rows, objective="regression"), cache_dir="unused")


def test_training_is_repeatable(tmp_path, trunk):
    rows = [{"text": text, "rating": liking(text)} for text in TEXTS[:80]]
    losses = []
    for _ in range(2):
        found: list[float] = []
        train(
            config(tmp_path, trunk, rows, objective="regression"),
            cache_dir="unused",
            progress=lambda done, total, loss, found=found: found.append(loss),
        )
        losses.append(found)
    assert losses[0] == losses[1]


def test_no_prompt_is_in_two_parts_and_a_split_by_pair_leaks(monkeypatch):
    pairs = [Preference(prompt=f"p{index % 40}", chosen=f"c{index}", rejected=f"r{index}") for index in range(400)]

    def num_shared() -> int:
        parts = split(pairs, held_out_fraction=0.2, seed=0)
        train_, validation, test = (
            {pair.prompt for pair in part} for part in (parts.train, parts.validation, parts.test)
        )
        assert len(parts.train) + len(parts.validation) + len(parts.test) == 400
        return len(train_ & test) + len(train_ & validation) + len(validation & test)

    assert num_shared() == 0
    monkeypatch.setattr(Preference, "split_key", property(lambda pair: pair.chosen))
    assert num_shared() > 20


def test_the_split_follows_from_seed_and_text_alone():
    ratings = [Rating(text=text, rating=0.0) for text in sorted(set(TEXTS))]
    whole = split(ratings, held_out_fraction=0.1, seed=0)
    assert 0.05 < len(whole.test) / len(ratings) < 0.15
    half = split(ratings[::2], held_out_fraction=0.1, seed=0)
    assert {r.text for r in half.test} == {r.text for r in whole.test} & {r.text for r in ratings[::2]}
    assert {r.text for r in split(ratings, held_out_fraction=0.1, seed=1).test} != {r.text for r in whole.test}
    with pytest.raises(ValueError, match="part must have rows"):
        split(ratings[:2], held_out_fraction=0.1, seed=0)


def test_objectives_by_hand():
    class Engine:
        def __init__(self, scores: list[float]) -> None:
            self.scores = torch.tensor(scores)

        def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return self.scores

    # Ratings 1, 2, 6: mean 3, variance (4 + 1 + 9) / 3; the second and third standardised are -0.4629 and 1.3887.
    regression = Regression([[1], [1], [1]], [1.0, 2.0, 6.0], CPU)
    expected = (0.5 + 0.46291) ** 2 + (1.0 - 1.38873) ** 2
    assert float(regression.loss_sum(Engine([0.5, 1.0]), [1, 2])) == pytest.approx(expected, abs=1e-4)
    # -log sigmoid(1) = 0.313262, -log sigmoid(-2) = 2.126928
    pairs = BradleyTerry([[1], [1, 2]], [[1], [1]], CPU)
    assert pairs.lengths == [1, 2]
    assert float(pairs.loss_sum(Engine([2.0, 0.0, 1.0, 2.0]), [0, 1])) == pytest.approx(2.440190, abs=1e-5)


def test_figures_by_hand_and_against_scipy():
    ratings = np.array([0.0, 2.0, 4.0, 4.5])
    scores = np.array([1.0, 3.0, 3.0, 0.0])
    # Pairs more than 1 apart: (2,0) right, (4,0) right, (4.5,0) wrong, (4,2) tied = 1/2, (4.5,2) wrong.
    assert pairwise_accuracy(scores, ratings, margin=1.0, seed=0).value == pytest.approx(2.5 / 5)
    random = np.random.default_rng(0)
    x = random.normal(size=300)
    y = 0.6 * x + 0.8 * random.normal(size=300)
    found = pearson(x, y, seed=0)
    reference = stats.pearsonr(x, y)
    assert found.value == pytest.approx(reference.statistic)
    low, high = reference.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


def test_intervals_resample_prompts_not_pairs():
    random = np.random.default_rng(0)
    wins = np.repeat(random.random(30) < 0.6, 20)  # twenty pairs a prompt, that agree
    chosen, rejected = wins.astype(float), np.full(600, 0.5)
    honest = preference_accuracy(chosen, rejected, np.repeat(np.arange(30), 20), seed=0)
    twin = preference_accuracy(chosen, rejected, np.arange(600), seed=0)
    assert honest.value == twin.value == wins.mean()
    assert honest.high - honest.low > 3 * (twin.high - twin.low)
    binomial = 2 * 1.96 * np.sqrt(honest.value * (1 - honest.value) / 30)
    assert honest.high - honest.low == pytest.approx(binomial, rel=0.2)


@pytest.mark.parametrize(
    ("parse", "row", "reason"),
    [
        ("parse_rating", {"text": "a"}, "rating must be there"),
        ("parse_rating", {"text": " ", "rating": 1}, "text must be a text that is not empty"),
        ("parse_rating", {"text": "a", "rating": "1"}, "rating must be a finite number, got '1'"),
        ("parse_rating", {"text": "a", "rating": True}, "rating must be a finite number"),
        ("parse_rating", {"text": "a", "rating": float("nan")}, "rating must be a finite number"),
        ("parse_preference", {"prompt": "p", "chosen": "a"}, "rejected must be there"),
        ("parse_preference", {"prompt": "p", "chosen": "a", "rejected": "a"}, "must differ"),
        ("parse_preference", {"prompt": 1, "chosen": "a", "rejected": "b"}, "string or a list of messages"),
        (
            "parse_preference",
            {"prompt": "p", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"},
            "assistant",
        ),
    ],
)
def test_malformed_rows(parse, row, reason):
    raw = judgements.RawRow(ordinal=0, file="f", line=1, value=row)
    with pytest.raises(ValueError, match=reason):
        getattr(judgements, parse)(raw)


def test_preferences_may_come_as_messages():
    value = {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
    found = judgements.parse_preference(judgements.RawRow(ordinal=0, file="f", line=1, value=value))
    assert found == Preference(prompt=value["prompt"], chosen="a", rejected="b")
