import pytest
import torch

from actors.rows import PromptGroup, split_responses
from actors.scoring import token_logprobs
from learner.config import LearnerConfig, LoraConfig
from learner.model import Critic, PolicyAndValue, Scoring, add_lora
from learner.networks import Networks
from tests.learner_toys import TEMPERATURE, learner_config, toy_model

GROUPS = [
    PromptGroup(prompt_ids=[5, 6, 7], responses=[[8, 9, 10], [11]]),
    PromptGroup(prompt_ids=[12], responses=[[13, 14]]),
]
SCORING = Scoring(temperature=TEMPERATURE, chunk_tokens=4)


def last_hidden(model, group: PromptGroup, response: list[int]) -> torch.Tensor:
    """Return [R + 1, H], what the head receives for the last prompt token and all response tokens of one sequence."""
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([[*group.prompt_ids, *response]])).last_hidden_state[0]
    return hidden[len(group.prompt_ids) - 1 :]


def expected_values(model, head: torch.nn.Linear) -> torch.Tensor:
    states = [last_hidden(model, group, response) for group in GROUPS for response in group.responses]
    with torch.no_grad():
        return head(torch.cat(states))[:, 0]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_values_are_of_the_states_before_each_token_and_after_the_last(model_type):
    module = PolicyAndValue(toy_model(model_type))
    torch.nn.init.normal_(module.value_head.weight)
    row = module.scorer.row(GROUPS)
    logprobs, entropy, values = module(row, SCORING)
    assert logprobs.shape == entropy.shape == (6,)
    assert torch.allclose(values, expected_values(module.policy, module.value_head), atol=1e-5)
    assert [len(v) for v in split_responses(values, [n + 1 for n in row.lengths])] == [4, 2, 3]
    shifted = expected_values(module.policy, module.value_head).roll(1)
    assert not torch.allclose(values, shifted, atol=1e-2)


def test_logprobs_are_the_scorers():
    module = PolicyAndValue(toy_model())
    row = module.scorer.row(GROUPS)
    logprobs, entropy, _ = module(row, SCORING)
    assert torch.allclose(logprobs, token_logprobs(module.scorer, row, temperature=TEMPERATURE), atol=1e-6)
    assert bool((entropy > 0).all())


def test_the_value_head_starts_at_zero():
    module = PolicyAndValue(toy_model())
    assert torch.equal(module(module.scorer.row(GROUPS), SCORING)[2], torch.zeros(9))


def test_a_pass_for_values_alone_skips_the_head():
    module = PolicyAndValue(toy_model())
    torch.nn.init.normal_(module.value_head.weight)
    row = module.scorer.row(GROUPS)
    logprobs, _, values = module(row, Scoring(temperature=1.0, chunk_tokens=4, has_tokens=False))
    assert logprobs.numel() == 0
    assert torch.equal(values, module(row, SCORING)[2])


def test_a_separate_critic_is_a_copy_of_the_trunk():
    policy = toy_model()
    critic = Critic(policy)
    torch.nn.init.normal_(critic.value_head.weight)
    module = PolicyAndValue(policy, has_value_head=False)
    row = module.scorer.row(GROUPS)
    assert torch.allclose(critic(row), expected_values(policy, critic.value_head), atol=1e-5)
    assert module(row, SCORING)[2].numel() == 0
    shared = {id(p) for p in policy.parameters()} & {id(p) for p in critic.parameters()}
    assert not shared


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_lora_trains_adapters_and_the_value_head_only(model_type):
    model = toy_model(model_type)
    row = PolicyAndValue(model).scorer.row(GROUPS)
    before = PolicyAndValue(model)(row, SCORING)[0]
    add_lora(model, LoraConfig(rank=2, alpha=4.0))
    module = PolicyAndValue(model)
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert all("lora_" in name or name.startswith("value_head") for name in trained)
    num_layers = sum("lora_A" in name for name in trained)
    assert num_layers == (14 if model_type == "llama" else 8)  # every linear layer of two blocks, not the head
    assert torch.equal(module(row, SCORING)[0], before)  # B starts at 0


def test_named_lora_targets():
    model = toy_model()
    add_lora(model, LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj",)))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all(".q_proj.lora_" in name for name in trained)


@pytest.mark.parametrize("critic", ["trunk", "separate"])
def test_gradient_checkpointing_changes_no_gradient(critic):
    def gradients(config: LearnerConfig) -> dict[str, torch.Tensor]:
        networks = Networks(toy_model(), config, scoring=SCORING, dtype=torch.float32, rank=0)
        forward = networks.forward(networks.module.scorer.row(GROUPS))
        (forward.logprobs.sum() + forward.values.sum()).backward()
        return {n: p.grad for e in networks.engines.values() for n, p in e.module.named_parameters()}

    plain = gradients(learner_config(critic=critic))
    checkpointed = gradients(learner_config(critic=critic, gradient_checkpointing=True))
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-6) for name in plain)


def test_nothing_is_offloaded_without_a_gpu():
    config = LearnerConfig.model_validate({"offload": "optimizer"})
    with pytest.raises(ValueError, match=r"learner\.offload must be none without a GPU"):
        Networks(toy_model(), config, scoring=SCORING, dtype=torch.float32, rank=0)
