"""Cost models: the loss by hand, a planted boundary that is found where it is, rows that contradict themselves."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from actors.architecture import character_tokenizer
from actors.dataset import RawRow
from learner.config import DataConfig, OptimizerConfig, RewardModelConfig, TrainingConfig
from learner.judgements import SafetyJudgement, parse_safety
from learner.rating_metrics import sign_accuracy
from learner.reward_modeling import train
from learner.reward_objectives import CostModel
from reward.model import RewardModel
from tests.checks import Case, Check, with_twins

CPU = torch.device("cpu")


class Engine:
    """Gives the costs it is made of, whatever it reads."""

    def __init__(self, costs: torch.Tensor) -> None:
        self.costs = costs

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.costs


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def has_the_published_loss(objective_type) -> None:
    """Two pairs (less safe, safer): costs (2, -1), unsafe and safe; (0.5, 3), both unsafe."""
    texts = [[1], [1, 2], [1]]
    labels = [(True, True), (False, True), (False, False)]
    objective = objective_type(texts, texts, is_safe=labels, device=CPU)
    costs = torch.tensor([2.0, 0.5, -1.0, 3.0], dtype=torch.float64, requires_grad=True)
    loss = objective.loss_sum(Engine(costs), [1, 2])
    # -log s(3) - log s(2) - log s(1)  and  -log s(-2.5) - log s(0.5) - log s(3)
    expected = -sum(math.log(_sigmoid(x)) for x in (3.0, 2.0, 1.0, -2.5, 0.5, 3.0))
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-5)
    loss.backward()
    # d/dx of -log s(x) is s(x) - 1; each cost takes part in one difference and one sign.
    slope = [_sigmoid(x) - 1.0 for x in (3.0, 2.0, 1.0, -2.5, 0.5, 3.0)]
    by_hand = [slope[0] + slope[1], slope[3] + slope[4], -slope[0] - slope[2], -slope[3] + slope[5]]
    np.testing.assert_allclose(costs.grad.numpy(), by_hand, atol=1e-6)


class SignsSwapped(CostModel):
    """Planted: an unsafe response is to have a negative cost."""

    def __init__(self, less_safe, safer, *, is_safe, device):
        super().__init__(less_safe, safer, is_safe=[(not a, not b) for a, b in is_safe], device=device)


class LabelsCrossed(CostModel):
    """Planted: each response has the label of the other."""

    def __init__(self, less_safe, safer, *, is_safe, device):
        super().__init__(less_safe, safer, is_safe=[(b, a) for a, b in is_safe], device=device)


class RankedUpsideDown(CostModel):
    """Planted: the safer response is to cost more, as in a reward model."""

    def loss_sum(self, engine, examples):
        self._signs = self._signs.flip(1)
        return super().loss_sum(Engine(engine.costs.reshape(2, -1).flip(0).reshape(-1)), examples)


class SignsOnly(CostModel):
    """Planted: no ranking."""

    def loss_sum(self, engine, examples):
        costs = engine.costs.reshape(2, -1)
        return super().loss_sum(engine, examples) + torch.nn.functional.logsigmoid(costs[0] - costs[1]).sum()


CHECKS = (
    Check(
        id="cost-loss",
        run=has_the_published_loss,
        part=CostModel,
        twins={
            "signs-swapped": SignsSwapped,
            "labels-crossed": LabelsCrossed,
            "ranked-upside-down": RankedUpsideDown,
            "signs-only": SignsOnly,
        },
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


def test_sign_accuracy_by_hand() -> None:
    costs, is_safe = np.array([1.0, -2.0, 0.0, 3.0]), np.array([False, True, True, True])
    assert sign_accuracy(costs, is_safe, np.arange(4), seed=0).value == 2.5 / 4
    assert sign_accuracy(-costs, is_safe, np.arange(4), seed=0).value == 1.5 / 4


RANDOM = np.random.default_rng(7)
DRAWN = ["".join(RANDOM.choice(list("abcdef"), size=RANDOM.integers(3, 12))) for _ in range(400)]


def harm(text: str) -> float:
    """The planted cost: unsafe is what has more a than b."""
    return 4.0 * (text.count("a") - text.count("b")) / len(text)


TEXTS = [text for index, text in enumerate(DRAWN) if harm(text) < 0 or (harm(text) > 0 and index % 3 == 0)]
"""Three in four are safe, and none is at the boundary."""


def pairs() -> list[dict[str, object]]:
    rows = []
    for by in (1, 2, 3, 4):
        for index, text in enumerate(TEXTS):
            safer, less_safe = sorted((text, TEXTS[index - by]), key=harm)
            if harm(less_safe) > harm(safer) + 0.4:
                labels = {"safer_is_safe": harm(safer) < 0, "less_safe_is_safe": harm(less_safe) < 0}
                prompt = "abcdef"[index % 6] * (1 + index % 5) + "?"
                rows.append({"prompt": prompt, "safer": safer, "less_safe": less_safe, **labels})
    return rows


def test_a_planted_boundary_is_found_at_zero(tmp_path) -> None:
    trunk, data, output = (tmp_path / name for name in ("trunk", "data.jsonl", "cost_model"))
    tokenizer = character_tokenizer("abcdef? ")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    AutoModel.from_config(
        AutoConfig.for_model("bert", vocab_size=len(tokenizer), initializer_range=0.2, **sizes)
    ).save_pretrained(trunk)
    tokenizer.save_pretrained(trunk)
    data.write_text("\n".join(map(json.dumps, pairs())))
    config = RewardModelConfig(
        output=str(output),
        model=str(trunk),
        data=DataConfig(path=str(data)),
        objective="cost",
        training=TrainingConfig(
            epochs=6,
            batch_size=16,
            optimizer=OptimizerConfig(learning_rate=3e-3, schedule="linear", warmup_steps=5),
            max_tokens=32,
        ),
        head_learning_rate=1e-2,
        held_out_fraction=0.15,
    )
    metrics = train(config, cache_dir="unused").metrics
    assert metrics["test_pairwise_accuracy"] > 0.9
    assert metrics["test_sign_accuracy"] > 0.85
    assert metrics["test_sign_accuracy_low"] <= metrics["test_sign_accuracy"] <= metrics["test_sign_accuracy_high"]
    model = RewardModel.load(str(output), device=CPU)
    assert (float(model.gain), float(model.bias)) == (1.0, 0.0)
    costs = np.array(model.score(TEXTS[:64], prompt="cc?"))
    is_unsafe = np.array([harm(text) > 0 for text in TEXTS[:64]])
    assert ((costs > 0) == is_unsafe).mean() > 0.9
    # Shifted to mean 0, as a reward model is, the boundary would be lost: most texts are safe.
    assert ((costs > costs.mean()) == is_unsafe).mean() < ((costs > 0) == is_unsafe).mean()


GOOD = {"prompt": "p", "safer": "a", "less_safe": "b", "safer_is_safe": True, "less_safe_is_safe": False}


def test_a_row_of_judgements_of_safety() -> None:
    found = parse_safety(RawRow(ordinal=0, file="f", line=1, value=GOOD))
    assert found == SafetyJudgement(prompt="p", safer="a", less_safe="b", safer_is_safe=True, less_safe_is_safe=False)
    assert found.ordered == ("b", "a")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"less_safe": "a"}, "safer and less_safe must differ, got 'a' twice"),
        ({"safer_is_safe": None}, r"safer_is_safe must be there, got columns"),
        ({"less_safe_is_safe": 0}, "less_safe_is_safe must be true or false, got 0"),
        (
            {"safer_is_safe": False, "less_safe_is_safe": True},
            "the safer response must be safe where the less safe one is, got labels that contradict it",
        ),
    ],
)
def test_malformed_rows(change: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_safety(RawRow(ordinal=0, file="f", line=1, value={**GOOD, **change}))
