"""Policy with value heads, their objective and the targets' slow average."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actors.rows import PromptGroup
from actors.value_heads import ValueHeads
from learner.config import OptimizerConfig, TrainingConfig
from learner.offline_data import Trajectory
from learner.optimizer import make_engine
from learner.training import fit, silent
from learner.value_config import ILQLConfig, QLearningConfig
from learner.value_model import PolicyWithValues
from learner.value_objective import ValueObjective, value_inputs
from tests.learner_toys import VOCAB, toy_model

CPU = torch.device("cpu")
SETTINGS = {"ilql": ILQLConfig(polyak=0.25), "q_learning": QLearningConfig(polyak=0.25)}
every_algorithm = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def module(settings=SETTINGS["ilql"], model_type: str = "llama", *, is_trained: bool = True, **options):
    """A tiny policy with heads; trained heads say something else for each token and state."""
    made = PolicyWithValues(toy_model(model_type), settings, **options)
    if is_trained:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in made.heads.named_parameters():
            if "outer" in name:
                parameter.data.normal_(0, 0.3, generator=generator)
    return made


def trajectory(prompt, response, **settings) -> Trajectory:
    values = {"is_learnt": [True] * len(response), "score": 1.0, "is_terminal": True}
    return Trajectory(prompt_ids=prompt, response_ids=response, **(values | settings))


TRAJECTORIES = [
    trajectory([5, 6, 7], [8, 9, 2]),
    trajectory([11], [12, 13, 14, 15], is_learnt=[True, False, False, True], score=-0.5, is_terminal=False),
    trajectory([20, 21], [22], score=2.0),
]


def row_of(made: PolicyWithValues, trajectories):
    groups = [PromptGroup(prompt_ids=t.prompt_ids, responses=[t.response_ids]) for t in trajectories]
    return made.scorer.row(groups)


@torch.no_grad()
def plain_numbers(made: PolicyWithValues, one: Trajectory):
    """Values of one trajectory by an ordinary forward pass: Q of both heads, target, V, log-probs of all tokens."""
    ids = torch.tensor([one.prompt_ids + one.response_ids])
    first = len(one.prompt_ids) - 1
    hidden = made.policy.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, first:]
    logits = made.policy(input_ids=ids, use_cache=False).logits[0, first:-1]
    q = torch.stack([head(hidden) for head in made.heads.q])
    target = torch.stack([head(hidden) for head in made.heads.target_q]).amin(0)
    v = target.amax(-1) if made.heads.v is None else made.heads.v(hidden)[:, 0]
    return q, target, v, logits.log_softmax(-1)


@every_algorithm
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_numbers_equal_an_ordinary_forward(settings, model_type):
    made = module(settings, model_type)
    logprobs, numbers = made(row_of(made, TRAJECTORIES))
    assert numbers.shape == (6, sum(len(t.response_ids) + 1 for t in TRAJECTORIES))
    token = state = 0
    for one in TRAJECTORIES:
        q, target, v, log_softmax = plain_numbers(made, one)
        actions, steps = torch.tensor(one.response_ids), torch.arange(len(one.response_ids))
        found = numbers[:, state : state + len(actions)]
        torch.testing.assert_close(found[:2], q[:, steps, actions], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[2:4], -q.log_softmax(-1)[:, steps, actions], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[4], target[steps, actions], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(numbers[5, state : state + len(v)], v, atol=1e-5, rtol=1e-4)
        expected = log_softmax[steps, actions]
        torch.testing.assert_close(logprobs[token : token + len(actions)], expected, atol=1e-5, rtol=1e-4)
        token, state = token + len(actions), state + len(actions) + 1


def gradients(made: PolicyWithValues, settings=SETTINGS["ilql"]):
    engine = make_engine(made, OptimizerConfig(), backend="local", zero_stage=0)
    ValueObjective(made, TRAJECTORIES, settings, CPU).loss_sum(engine, range(3)).backward()
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def test_chunks_change_no_gradient():
    whole, cut = gradients(module()), gradients(module(chunk_tokens=4))
    assert whole.keys() == cut.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], cut[name], atol=1e-5, rtol=1e-4)


def test_values_train_the_trunk_and_no_target_gets_a_gradient():
    found = gradients(module(ILQLConfig(bc_coef=0.0, polyak=0.25)), ILQLConfig(bc_coef=0.0))
    assert {name.split(".")[1] for name in found if name.startswith("heads.")} == {"q", "v"}
    assert found["policy.model.layers.0.mlp.up_proj.weight"].abs().sum() > 0


def test_a_new_module_values_everything_at_zero():
    made = module(is_trained=False)
    _, numbers = made(row_of(made, TRAJECTORIES))
    assert not numbers[[0, 1, 4, 5]].any()
    torch.testing.assert_close(numbers[2:4], torch.full_like(numbers[2:4], np.log(VOCAB)))
    first, second = (head.inner.weight for head in made.heads.q)
    assert not torch.equal(first, second)  # twins that differ
    again, other = module(is_trained=False), module(is_trained=False, seed=1)
    assert torch.equal(again.heads.q[0].inner.weight, first)
    assert not torch.equal(other.heads.q[0].inner.weight, first)


def test_only_learnt_tokens_are_actions():
    """Two trajectories; in the first 6 is an environment's: actions 5, 7 | 8, states before 5, before 7, end | ..."""
    trajectories = [trajectory([1], [5, 6, 7], is_learnt=[True, False, True], is_terminal=False), trajectory([1], [8])]
    numbers = torch.arange(6.0)[:, None] * 100 + torch.arange(6.0)
    inputs = value_inputs(-torch.arange(4.0), numbers, trajectories)
    assert inputs.q.tolist() == [[0.0, 2.0, 4.0], [100.0, 102.0, 104.0]]
    assert inputs.target_q.tolist() == [400.0, 402.0, 404.0]
    assert inputs.values.tolist() == [500.0, 502.0, 503.0, 504.0, 505.0]
    assert inputs.logprobs.tolist() == [0.0, -2.0, -3.0]
    assert inputs.lengths == (2, 1)
    assert inputs.is_terminal.tolist() == [False, True]


def test_a_trajectory_without_a_learnt_token_is_refused():
    empty = trajectory([1], [2], is_learnt=[False])
    with pytest.raises(ValueError, match=r"must have a learnt token.*number 1"):
        ValueObjective(module(), [TRAJECTORIES[0], empty], SETTINGS["ilql"], CPU)


@every_algorithm
def test_training_journals_its_parts_and_moves_the_targets(settings, tmp_path):
    made = module(settings)
    objective = ValueObjective(made, TRAJECTORIES, settings, CPU)
    assert objective.lengths == [6, 5, 3]
    assert objective.units == [3, 2, 1]
    before = [p.clone() for p in made.heads.target_q.parameters()]
    config = TrainingConfig(batch_size=3, epochs=2, optimizer=OptimizerConfig(learning_rate=1e-2))
    engine = make_engine(made, config.optimizer, backend="local", zero_stage=0)
    sources = []

    def after_update():
        metrics = objective.after_update()
        sources.append([p.detach().clone() for p in made.heads.q.parameters()])
        return metrics

    fit(engine, objective, config, directory=str(tmp_path), progress=silent, after_update=after_update)
    journal = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # The loss is the sum of its parts with their weights: 1, 1, cql_coef 0.1, bc_coef 1.
    for line in journal:
        parts = line["q_loss"] + line["v_loss"] + 0.1 * line["cql_loss"] + line["bc_loss"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
    # After each update: target <- 0.75 target + 0.25 source.
    for target, start, first, second in zip(made.heads.target_q.parameters(), before, *sources, strict=True):
        torch.testing.assert_close(target, 0.75 * (0.75 * start + 0.25 * first) + 0.25 * second)


def test_a_slow_average_survives_half_precision():
    """bfloat16 has 8 bits: a target that is itself the average never takes a step of 0.1% of the distance."""
    made = module(ILQLConfig(polyak=0.001), is_trained=False).to(torch.bfloat16)
    target, source = made.heads.target_q[0].outer.bias, made.heads.q[0].outer.bias
    with torch.no_grad():
        target.fill_(1.0)
        source.fill_(2.0)
    for _ in range(700):
        made.update_targets()
    expected = 2.0 - 0.999**700
    assert target.dtype == torch.bfloat16
    assert float(target[0]) == pytest.approx(expected, abs=0.01)
    twin = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(700):
        twin.lerp_(source[:1].detach(), 0.001)
    assert float(twin) == 1.0


def test_sharded_heads_are_refused():
    made = module()
    made.heads.q[0].inner.weight.data = torch.empty(0)  # what ZeRO 3 leaves of a parameter
    with pytest.raises(ValueError, match="zero_stage to 2 or less"):
        made.update_targets()


@every_algorithm
def test_saved_heads_come_back_with_the_same_bits(settings, tmp_path):
    made = module(settings)
    made.save_heads(str(tmp_path))
    loaded, beta = ValueHeads.load(str(tmp_path))
    assert beta == settings.guidance
    assert not loaded.training
    saved = made.heads.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    assert any(name.startswith("v.") for name in saved) == (settings.name == "ilql")


def test_a_directory_without_heads_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"value_heads\.json.*concord offline"):
        ValueHeads.load(str(tmp_path))


def test_settings_that_would_be_ignored_are_refused():
    with pytest.raises(ValueError, match="awac_beta must be 0 with bc_coef 0"):
        ILQLConfig(awac_beta=1.0, bc_coef=0.0)
    with pytest.raises(ValueError, match="tau"):
        QLearningConfig.model_validate({"tau": 0.7})


@every_algorithm
def test_a_choice_that_scores_gets_the_higher_value(settings, tmp_path):
    """One decision: after prompt 5 token 7 scores 1, token 8 scores 0; after token 9 more could follow."""
    data = [trajectory([5], [7], score=1.0), trajectory([5], [8], score=0.0)]
    made = module(settings, is_trained=False)
    objective = ValueObjective(made, data, settings, CPU)
    config = TrainingConfig(batch_size=2, epochs=60, optimizer=OptimizerConfig(learning_rate=3e-3))
    engine = make_engine(made, config.optimizer, backend="local", zero_stage=0)
    fit(engine, objective, config, directory=str(tmp_path), progress=silent, after_update=objective.after_update)
    _, numbers = made(row_of(made, data))
    at = SimpleNamespace(good=numbers[:, 0].detach(), bad=numbers[:, 2].detach())
    assert float(at.good[0] - at.bad[0]) > 0.5
    assert float(at.good[4] - at.bad[4]) > 0.5
    # V: ILQL's expectile 0.7 of scores 1 and 0 is 0.7; Q-learning's is the largest.
    assert float(at.good[5]) == pytest.approx(0.7 if settings.name == "ilql" else 1.0, abs=0.2)
