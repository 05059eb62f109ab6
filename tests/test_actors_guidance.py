"""Sampling with learned values: the formula, the engine's recorded log-probs, and its promises."""

import numpy as np
import pytest
import torch

from actors.guidance import ValueGuidance
from actors.value_heads import HeadShape, ValueHeads
from tests.engine_toys import (
    PROMPTS,
    VOCAB,
    assert_same_bits,
    build,
    every_architecture,
    make_engine,
    plain_logprobs,
    request,
    serve,
)

BETA = 2.0
WIDTH = 32


def heads(*, has_v: bool = True, seed: int = 0) -> ValueHeads:
    """Heads whose values matter."""
    made = ValueHeads(HeadShape(hidden_size=WIDTH, vocab_size=VOCAB, has_v=has_v), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        if "outer" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    return made


@torch.no_grad()
def guided_logprobs(name: str, made: ValueHeads, prompt, response, *, temperature: float = 1.0, beta: float = BETA):
    """Return log pi(a|s) by one ordinary forward and the formula pi ~ pi_beta exp(beta min Q): V cancels."""
    model = build(name)
    received = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    ids = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    hidden = received[0][0, len(prompt) - 1 : -1]
    q = torch.stack([head(hidden) for head in made.target_q]).amin(0)
    policy = logits.softmax(-1) * (beta * q).exp()
    logprobs = ((policy / policy.sum(-1, keepdim=True)).log() / temperature).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(response)[:, None].long())[:, 0].numpy()


@every_architecture
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logprobs_are_those_of_the_guided_policy(name, temperature):
    made = heads()
    engine = make_engine(name, logits_hook=ValueGuidance(made, beta=BETA))
    done = serve(engine, *[request(key, prompt, 2, temperature=temperature) for key, prompt in PROMPTS.items()])
    for (key, _), completion in done.items():
        expected = guided_logprobs(name, made, PROMPTS[key], completion.response_ids, temperature=temperature)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    # Planted twins: without guidance, and with its sign turned.
    for beta in (0.0, -BETA):
        wrong = guided_logprobs(name, made, PROMPTS[key], completion.response_ids, temperature=temperature, beta=beta)
        assert np.abs(completion.logprobs - wrong).max() > 1e-2


def test_the_smaller_of_the_targets_guides_and_v_moves_no_probability():
    made, logits, hidden = heads(), torch.randn(4, VOCAB), torch.randn(4, WIDTH)
    guided = ValueGuidance(made, beta=BETA)(logits, hidden, ["a"] * 4)
    with torch.no_grad():
        targets = torch.stack([head(hidden) for head in made.target_q])
        expected = logits + BETA * (targets.amin(0) - made.v(hidden))
        torch.testing.assert_close(guided, expected)
        torch.testing.assert_close(guided.log_softmax(-1), (logits + BETA * targets.amin(0)).log_softmax(-1))
        assert not torch.allclose(guided, logits + BETA * (targets[0] - made.v(hidden)), atol=1e-3)
        for parameter in made.q.parameters():  # the trained twins are not asked
            parameter.fill_(7.0)
    assert torch.equal(ValueGuidance(made, beta=BETA)(logits, hidden, ["a"] * 4), guided)


def test_without_a_v_head_the_best_token_keeps_its_logit():
    made, logits, hidden = heads(has_v=False), torch.randn(3, VOCAB), torch.randn(3, WIDTH)
    difference = ValueGuidance(made, beta=BETA)(logits, hidden, ["a"] * 3) - logits
    assert difference.amax(-1).tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    assert (difference <= 1e-6).all()


@every_architecture
@pytest.mark.parametrize("has_v", [True, False])
def test_a_guided_sample_has_the_same_bits_in_any_company(name, has_v):
    guidance = ValueGuidance(heads(has_v=has_v), beta=BETA)
    requests = [request(key, prompt, 3, max_new_tokens=6 + len(prompt)) for key, prompt in PROMPTS.items()]
    together = serve(make_engine(name, max_rows=12, logits_hook=guidance), *requests)
    engine = make_engine(name, logits_hook=guidance)
    for item in requests:
        alone = serve(engine, item)
        for index in range(3):
            assert_same_bits(together[item.request_id, index], alone[item.request_id, index])


def test_zero_beta_samples_from_the_policy():
    done = serve(make_engine(logits_hook=ValueGuidance(heads(), beta=0.0)), request("a", PROMPTS["a"], 2))
    free = serve(make_engine(), request("a", PROMPTS["a"], 2))
    for key in done:
        assert_same_bits(done[key], free[key])


def test_a_large_beta_takes_the_best_token():
    made = heads(has_v=False)
    done = serve(make_engine(logits_hook=ValueGuidance(made, beta=1e4)), request("a", PROMPTS["a"]))["a", 0]
    assert np.abs(done.logprobs).max() < 1e-3
    free = plain_logprobs(build("llama"), PROMPTS["a"], done.response_ids)
    assert free.min() < -1.0  # tokens that the policy alone would seldom take


def test_guidance_loads_what_was_saved(tmp_path):
    made = heads()
    made.save(str(tmp_path), beta=5.0)
    loaded = ValueGuidance.load(str(tmp_path), device=torch.device("cpu"))
    assert loaded.beta == 5.0
    assert ValueGuidance.load(str(tmp_path), beta=1.0, device=torch.device("cpu")).beta == 1.0
    logits, hidden = torch.randn(2, VOCAB), torch.randn(2, WIDTH)
    assert torch.equal(loaded(logits, hidden, ["a", "b"]), ValueGuidance(made, beta=5.0)(logits, hidden, ["a", "b"]))


def test_a_negative_beta_is_refused():
    with pytest.raises(ValueError, match="beta must be at least 0, got -1"):
        ValueGuidance(heads(), beta=-1.0)
