import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from actors import scoring, shared_attention
from actors.rows import PromptGroup, attention_mask, group_row
from actors.scorer import Scorer, ScoringLinear, model_attention, model_mask
from actors.scoring import logprob_function, reference_logprobs, token_logprobs
from tests.learner_toys import VOCAB, tokens, toy_model

WINDOW = 6
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "gpt2": ("gpt2", {}),
    "glm": ("glm", {"head_dim": 8}),
    "mistral_window": ("mistral", {"sliding_window": WINDOW}),
    "qwen2_mixed": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "gpt_neox": ("gpt_neox", {}),
}
TEMPERATURE = 0.7


def toy_groups(seed: int = 1) -> list[PromptGroup]:
    """Two groups; prompts and responses are longer than the sliding window."""
    generator = np.random.default_rng(seed)
    first = PromptGroup(prompt_ids=tokens(generator, 9), responses=[tokens(generator, n) for n in (8, 5, 11)])
    second = PromptGroup(prompt_ids=tokens(generator, 4), responses=[tokens(generator, n) for n in (6, 1)])
    return [first, second]


@torch.no_grad()
def one_by_one(model: Any, groups: list[PromptGroup], temperature: float = TEMPERATURE) -> torch.Tensor:
    """Log-probs the plain way: each sequence alone, all logits, no mask."""
    result = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt_ids, *response]])
            log_softmax = (model(input_ids=ids, use_cache=False).logits[0].float() / temperature).log_softmax(-1)
            start = len(group.prompt_ids) - 1
            result += [log_softmax[start + i, token] for i, token in enumerate(response)]
    return torch.stack(result)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return bool((found - expected).abs().max() < tolerance)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_in_one_row_score_like_sequences_alone(name):
    model_type, settings = ARCHITECTURES[name]
    model = toy_model(model_type, **settings)
    expected = one_by_one(model, toy_groups())
    scorer = Scorer(model)
    assert (scorer.layout, scorer.is_chunked) == ("shared", True)
    row = scorer.row(toy_groups())
    assert row.input_ids.shape[0] == 1
    assert close(token_logprobs(scorer, row, temperature=TEMPERATURE, chunk_tokens=5), expected)


WITHOUT_MASK = ["llama", "llama_tied", "qwen2", "gpt2", "glm", "gpt_neox"]


def plans(scorer: Scorer) -> Scorer:
    """Let calls of the attention kernel cost nothing, so that these small rows need no mask."""
    scorer.call_cost = 0
    return scorer


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_groups_in_one_row_score_alike_without_a_mask(name, monkeypatch):
    model_type, settings = ARCHITECTURES[name]
    scorer = plans(Scorer(toy_model(model_type, **settings)))
    masks: list[Any] = []
    monkeypatch.setattr("actors.scorer.model_mask", lambda *arguments: masks.append(1) or model_mask(*arguments))
    row = scorer.row(toy_groups())
    found = token_logprobs(scorer, row, temperature=TEMPERATURE)
    assert close(found, one_by_one(scorer._model, toy_groups()))
    assert bool(masks) == (name not in WITHOUT_MASK)  # sliding windows are part of a mask


@pytest.mark.parametrize("spans", [((9, 24), (4, 6, 1)), ((9, 8, 5, 11, 4, 6, 1),), ((8, 9, 5, 11), (4, 6, 1))])
def test_the_comparison_finds_a_wrong_plan(spans):
    """Responses, or groups, that see each other; and a prompt without its last token."""
    scorer = plans(Scorer(toy_model()))
    row = dataclasses.replace(scorer.row(toy_groups()), spans=spans)
    found = token_logprobs(scorer, row, temperature=TEMPERATURE)
    assert not close(found, one_by_one(scorer._model, toy_groups()), 1e-2)


@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointing"])
def test_gradients_without_a_mask_are_those_with_one(is_checkpointed):
    gradients = []
    for call_cost in (0, 2**60):
        scorer = Scorer(toy_model())
        scorer.call_cost = call_cost
        if is_checkpointed:
            scorer._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            scorer._model.train()
        row = scorer.row(toy_groups())
        function = logprob_function(row.targets, temperature=TEMPERATURE, chunk_tokens=512)
        (scorer(row, function).tokens[:, 0] * torch.linspace(-1.0, 2.0, 31)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in scorer._model.parameters()]))
    assert (gradients[0] - gradients[1]).abs().max() < 2e-5 * gradients[1].abs().max()


def test_a_mask_is_left_out_where_that_is_cheaper():
    """300 tokens of 576 numbers: 44^2 + 4 * 64 * 108 of 300^2 pairs; of 32 numbers five calls cost more."""
    shape = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    wide, narrow = (toy_model(hidden_size=size, **shape) for size in (576, 32))
    group = PromptGroup(prompt_ids=[3] * 44, responses=[[4] * 64] * 4)
    found = [set(model_attention(Scorer(model).row([group]), model)) for model in (wide, narrow)]
    assert found == [{"attention_mask", "shared_row"}, {"attention_mask"}]


def test_a_model_is_left_alone_whose_attention_does_not_take_plans(monkeypatch):
    monkeypatch.setattr(shared_attention, "HARMLESS_KEYWORDS", frozenset())  # as if each keyword changed the result
    model = toy_model()
    scorer = plans(Scorer(model))
    assert (scorer.layout, model.config._attn_implementation) == ("shared", "sdpa")
    assert close(
        token_logprobs(scorer, scorer.row(toy_groups()), temperature=TEMPERATURE), one_by_one(model, toy_groups())
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padded_rows_score_like_sequences_alone(name):
    model_type, settings = ARCHITECTURES[name]
    scorer = Scorer(toy_model(model_type, **settings))
    row = group_row(toy_groups(), layout="padded")
    found = token_logprobs(scorer, row, temperature=TEMPERATURE, chunk_tokens=512)
    assert close(found, one_by_one(scorer._model, toy_groups()))


def planted(row: Any, bug: str) -> Any:
    if bug == "positions run on":
        return dataclasses.replace(row, position_ids=torch.arange(row.input_ids.numel())[None])
    if bug == "responses see each other":
        return dataclasses.replace(row, segments=row.segments.clamp(max=1))
    return dataclasses.replace(row, groups=torch.zeros_like(row.groups))


@pytest.mark.parametrize("bug", ["positions run on", "responses see each other", "groups see each other"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_comparison_finds_a_wrong_row(model_type, bug):
    scorer = Scorer(toy_model(model_type))
    row = planted(scorer.row(toy_groups()), bug)
    found = token_logprobs(scorer, row, temperature=TEMPERATURE)
    assert not close(found, one_by_one(scorer._model, toy_groups()), 1e-2)


@pytest.mark.parametrize("name", ["mistral_window", "qwen2_mixed"])
def test_the_comparison_finds_a_missing_window(name, monkeypatch):
    model_type, settings = ARCHITECTURES[name]
    scorer = Scorer(toy_model(model_type, **settings))
    whole = attention_mask
    monkeypatch.setattr("actors.scorer.attention_mask", lambda row, window=None: whole(row))
    found = token_logprobs(scorer, scorer.row(toy_groups()), temperature=TEMPERATURE)
    assert not close(found, one_by_one(scorer._model, toy_groups()), 1e-2)


def test_eager_attention_takes_an_additive_mask():
    model = toy_model("llama")
    model.set_attn_implementation("eager")
    scorer = Scorer(model)
    assert scorer.layout == "shared"
    found = token_logprobs(scorer, scorer.row(toy_groups()), temperature=TEMPERATURE)
    assert close(found, one_by_one(model, toy_groups()))


@pytest.mark.parametrize(("model_type", "settings"), [("granite", {"logits_scaling": 3.0}), ("cohere", {})])
def test_a_model_that_changes_its_logits_takes_the_plain_way(model_type, settings):
    scorer = Scorer(toy_model(model_type, **settings))
    assert (scorer.layout, scorer.is_chunked) == ("shared", False)
    row, expected = scorer.row(toy_groups()), one_by_one(scorer._model, toy_groups())
    assert close(token_logprobs(scorer, row, temperature=TEMPERATURE), expected)
    scorer.is_chunked = True  # what would happen without the trial
    assert not close(token_logprobs(scorer, row, temperature=TEMPERATURE), expected, 1e-2)


def test_a_model_without_4d_masks_gets_one_row_per_sample():
    settings = {"n_layer": 2, "n_head": 4, "attention_dropout": 0.0, "hidden_dropout": 0.0}
    model = toy_model("bloom", **settings)  # positions come from the mask, so no 4-D mask can say them
    scorer = Scorer(model)
    assert scorer.layout == "padded"
    assert scorer.row(toy_groups()).input_ids.shape[0] == 5
    found = token_logprobs(scorer, scorer.row(toy_groups()), temperature=TEMPERATURE)
    assert close(found, one_by_one(model, toy_groups()))


def test_reference_logprobs_are_one_array_per_response_whatever_the_rows():
    model = toy_model()
    group = toy_groups()[0]
    expected = one_by_one(model, [group]).split([8, 5, 11])
    for row_tokens in (4096, 23, 1):
        found = reference_logprobs(
            model, group.prompt_ids, group.responses, temperature=TEMPERATURE, chunk_tokens=7, row_tokens=row_tokens
        )
        assert [array.dtype for array in found] == [np.dtype("float32")] * 3
        assert all(close(torch.from_numpy(f), e) for f, e in zip(found, expected, strict=True))


def test_reference_logprobs_have_the_same_bits_in_any_order_of_calls():
    model = toy_model()
    first, second = toy_groups()
    score = lambda group: reference_logprobs(model, group.prompt_ids, group.responses, temperature=1.0)  # noqa: E731
    before = score(first)
    score(second)
    assert all(np.array_equal(a, b) for a, b in zip(before, score(first), strict=True))


def test_the_temperature_is_part_of_the_logprobs():
    model = toy_model()
    group = toy_groups()[0]
    found = reference_logprobs(model, group.prompt_ids, group.responses, temperature=1.0)
    assert not close(torch.from_numpy(np.concatenate(found)), one_by_one(model, [group]), 1e-2)


def test_logits_never_exist_for_more_tokens_than_a_chunk(monkeypatch):
    scorer = Scorer(toy_model())
    row = scorer.row(toy_groups())
    sizes: list[int] = []
    linear = F.linear

    def recording(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.shape[0] == VOCAB:
            sizes.append(hidden.shape[0])
        return linear(hidden, weight, bias)

    monkeypatch.setattr(scoring.F, "linear", recording)
    with torch.no_grad():
        scorer(row, logprob_function(row.targets, temperature=1.0, chunk_tokens=5))
    assert sizes == [5] * 6 + [1]  # 31 tokens


def test_the_head_keeps_its_parameters_and_returns_logits_without_a_request():
    model = toy_model(tie_word_embeddings=True)
    ids = torch.tensor([[3, 4, 5]])
    names, logits = list(model.state_dict()), model(input_ids=ids).logits
    Scorer(model)
    assert isinstance(model.lm_head, ScoringLinear)
    assert list(model.state_dict()) == names
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(input_ids=ids).logits, logits)


def test_a_failed_forward_leaves_no_request_behind():
    scorer = Scorer(toy_model())

    def failing(*_: Any) -> torch.Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        scorer(scorer.row(toy_groups()), failing)
    assert scorer._model(input_ids=torch.tensor([[3]])).logits.shape[-1] == scorer._model.config.vocab_size
