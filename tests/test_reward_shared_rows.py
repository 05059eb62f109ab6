"""Decoder judges: a group as rows that hold once what its texts begin with."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from actors.architecture import character_tokenizer
from actors.policy import attention_implementation
from actors.rows import GroupRow
from actors.scorer import model_mask
from reward.ensemble import Ensemble
from reward.model import RewardModel
from reward.shared_rows import own_tokens, shared_rows
from tests.checks import Case, Check, with_twins
from tests.test_reward_model import LETTERS

VOCAB, WINDOW = len(LETTERS) + 2, 6
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WINDOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_mixed": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", {"sliding_window": WINDOW, "head_dim": 8, "attn_logit_softcapping": 5.0}),
}
UNFIT: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon_alibi": ("falcon", {"alibi": True, "new_decoder_architecture": False}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {"bos_token_id": None, "eos_token_id": None}),
    "qwen2": ("qwen2", {}),
    **WINDOWED,
}


def toy_judge(name: str = "llama", *, seed: int = 0) -> RewardModel:
    """A judge whose weights are large enough for context to matter."""
    model_type, settings = (ARCHITECTURES | UNFIT)[name]
    heads = {} if model_type in ("gpt2", "falcon") else {"num_key_value_heads": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, vocab_size=VOCAB, **SIZES, **heads, **settings)
    config._attn_implementation = attention_implementation(config)
    torch.manual_seed(seed)
    trunk = AutoModel.from_config(config)
    judge = RewardModel(trunk, character_tokenizer(LETTERS), pooling="last", has_eos=True)
    with torch.no_grad():
        for parameter in judge.parameters():
            parameter.normal_(0.0, 0.15) if parameter.ndim > 1 else None
    return judge.eval()


def toy_texts(*lengths: int, num_shared: int = 12, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    start = draw.integers(VOCAB, size=num_shared).tolist()
    return [start + draw.integers(VOCAB, size=length).tolist() for length in lengths]


def alone(judge: RewardModel, texts: list[list[int]]) -> list[float]:
    """Scores the plain way: each text by itself, without a mask."""
    with torch.no_grad():
        states = [judge.trunk(input_ids=torch.tensor([text])).last_hidden_state[0, -1] for text in texts]
        return (judge.gain * judge.head(torch.stack(states))[:, 0] + judge.bias).tolist()


# --- which texts share a row ---


def test_rows_by_hand():
    question = list(range(10, 20))
    texts = [[*question, 1, 2, 3, 4, 5, 6], [*question, 7, 8], [16, 17, 18, 19, *[9] * 9], [*question, 1, 3, 1, 3]]
    (row,), rest = shared_rows(texts, hidden_size=576)
    assert (row.indices, row.prefix, rest) == ((0, 1, 3), question, [2])
    assert row.rests == [[1, 2, 3, 4, 5, 6], [7, 8], [1, 3, 1, 3]]


def test_each_text_keeps_a_token_of_its_own():
    question = list(range(10))
    (row,), _ = shared_rows([question, [*question, 1], question], hidden_size=576)
    assert (row.prefix, row.rests) == (question[:-1], [[9], [9, 1], [9]])
    assert shared_rows([[5], [5], [5, 6]], hidden_size=576)[1] == [0, 1, 2], "nothing to gain, nothing to share"


def test_rows_hold_every_text_once_and_no_more_than_they_should():
    texts = toy_texts(*range(1, 81), num_shared=100)
    rows, rest = shared_rows(texts, hidden_size=576)
    assert rest == []
    budget = own_tokens(100, hidden_size=576)
    assert budget == 512, "isqrt(100 * (100 + 4 * 576)) = 490 would starve a GPU"
    assert [index for row in rows for index in row.indices] == list(range(80))
    assert [text for row in rows for text in ([*row.prefix, *own] for own in row.rests)] == texts
    assert all(sum(map(len, row.rests)) <= budget for row in rows)
    assert own_tokens(400, hidden_size=576) == 1040, "its square is 400 * (400 + 4 * 576)"
    assert own_tokens(4000, hidden_size=576) == 96, "the mask has 4096 rows at most"


def test_texts_that_share_too_little_are_read_alone():
    """512 own tokens behind 8: 520 + 520^2 / 2304 = 637, 124 a text; padded 108 + 108^2 / 2304 = 113."""
    assert shared_rows(toy_texts(*[100] * 40, num_shared=8), hidden_size=576)[0] == []
    assert shared_rows(toy_texts(*[100] * 40, num_shared=60), hidden_size=576)[1] == []


# --- what they are worth ---


def scores_like_texts_alone(architectures: dict[str, Any]) -> Callable[[Any], None]:
    def run(mask: Callable[..., Any]) -> None:
        texts = toy_texts(5, 9, 1, 14)
        for name in architectures:
            judge = toy_judge(name)
            assert judge.layout == "shared"
            assert shared_rows(texts, hidden_size=32)[1] == []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("reward.shared_rows.model_mask", mask)
                found = judge.score_ids(texts)
            assert found == pytest.approx(alone(judge, texts), abs=2e-5), name
            judge.layout = "padded"
            assert found == pytest.approx(judge.score_ids(texts), abs=2e-5), name

    return run


def seeing_each_other(row: GroupRow, model: Any) -> Any:
    """Planted bug: a text sees those before it in the row."""
    row.segments.zero_()
    return model_mask(row, model)


def seeing_no_prefix(row: GroupRow, model: Any) -> Any:
    row.groups.copy_(row.segments)
    return model_mask(row, model)


def without_window(row: GroupRow, model: Any) -> Any:
    mask = model_mask(row, model)
    if isinstance(mask, dict):
        return dict.fromkeys(mask, mask["full_attention"])
    row.position_ids.zero_()
    return model_mask(row, model)


def in_order_of_the_row(row: GroupRow, model: Any) -> Any:
    """Planted bug: the window counts places in the row instead of positions in the text."""
    row.position_ids.copy_(torch.arange(row.position_ids.numel()))
    return model_mask(row, model)


CHECKS = (
    Check(
        id="shared-judge",
        run=scores_like_texts_alone(ARCHITECTURES),
        part=model_mask,
        twins={"texts-see-each-other": seeing_each_other, "nobody-sees-the-prefix": seeing_no_prefix},
    ),
    Check(
        id="shared-judge-window",
        run=scores_like_texts_alone(WINDOWED),
        part=model_mask,
        twins={"no-window": without_window, "window-over-the-row": in_order_of_the_row},
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


@pytest.mark.parametrize("name", ["falcon_alibi", "lfm2"])  # one refuses the mask, the other convolves over the row
def test_a_model_that_cannot_share_rows_is_found_out(name):
    judge, texts = toy_judge(name), toy_texts(5, 9, 3)
    assert judge.layout == "padded"
    assert judge.score_ids(texts) == pytest.approx(alone(judge, texts), abs=2e-5)


def test_a_wrong_mask_is_found_out(monkeypatch):
    monkeypatch.setattr("reward.shared_rows.model_mask", seeing_each_other)
    assert toy_judge().layout == "padded"


def test_the_bits_of_a_group_depend_on_its_texts_alone():
    judge = toy_judge()
    group = [*toy_texts(5, 9, 1, 14), *toy_texts(6, seed=1)]
    first = judge.score_ids(group)
    judge.score_ids(toy_texts(40, 3, 3, num_shared=30, seed=2))
    assert judge.score_ids(group) == first
    assert toy_judge().score_ids(group) == first


def test_texts_cut_off_at_their_beginning_are_read_as_they_are():
    judge = toy_judge()
    answers = ["short", "a bit longer", "an answer so long that the question is cut", "no"]
    question = "what is the question "
    ids = [judge.encode(answer, prompt=question, max_tokens=40) for answer in answers]
    rows, rest = shared_rows(ids, hidden_size=32)
    assert ([row.indices for row in rows], rest) == ([(0, 1, 3)], [2])
    assert judge.score(answers, prompt=question, max_tokens=40) == pytest.approx(alone(judge, ids), abs=2e-5)


def test_an_ensemble_s_members_read_the_prompt_once():
    members = [toy_judge(seed=seed) for seed in range(2)]
    shapes: list[tuple[int, ...]] = []
    for member in members:
        assert member.layout == "shared"
        member.trunk.get_input_embeddings().register_forward_pre_hook(lambda _, ids: shapes.append(ids[0].shape))
    means, deviations = Ensemble(members).score(["yes", "no", "maybe"], prompt="is it raining ", max_tokens=64)
    assert shapes == [(1, 14 + 4 + 3 + 6)] * 2, "the prompt, and each answer with its EOS"
    ids = [members[0].encode(text, prompt="is it raining ", max_tokens=64) for text in ("yes", "no", "maybe")]
    both = [alone(member, ids) for member in members]
    assert means == pytest.approx(np.mean(both, axis=0), abs=2e-5)
    assert deviations == pytest.approx(np.std(both, axis=0), abs=2e-5)
