"""Token scores: the reward model's attention and the judge's scores of prefixes, per token of the policy."""

import json
import os
import sys
import types

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from actors.policy import materialize
from actors.schema import ROLLOUTS
from reward.attention import recorded_attention
from reward.config import RewardConfig
from reward.credit import token_ends, token_shares
from reward.credit_config import CreditConfig
from reward.ensemble import Ensemble
from reward.errors import RewardError
from reward.model import RewardModel, pad_rows
from reward.reward_worker import RewardWorker
from tests.checks import Case, Check, with_twins
from tests.test_reward_model import write_model
from tests.test_reward_worker import policy

CPU = torch.device("cpu")
TEXTS = ["abc", "d", "hello world", "zz zz zz zz zz"]
ARCHITECTURES = {
    "bert": {},
    "modernbert": {"pad_token_id": 33, "local_attention": 4},
    "gpt2": {"bos_token_id": None, "eos_token_id": 34},
    "llama": {"num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 3},
    "gemma2": {"num_key_value_heads": 1, "head_dim": 16, "attn_logit_softcapping": 0.5, "sliding_window": 4},
}


def byte_tokenizer(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """One token per byte, and one for each merge; EOS behind them."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(first + second for first, second in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def sharp_model(directory, model_type: str, **settings: object) -> str:
    """A tiny random model that looks at some tokens much more than at others."""
    write_model(directory, model_type, **settings)
    model = AutoModel.from_pretrained(directory)
    torch.manual_seed(0)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.normal_(0.0, 0.5) if parameter.ndim > 1 else parameter.fill_(0.5)
    model.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: sharp_model(root / name, name, **settings) for name, settings in ARCHITECTURES.items()}


# --- what the model looks at ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recorded_attention_is_the_slow_implementation_s_and_leaves_no_trace(directories, name):
    model = RewardModel.build(directories[name])
    before = model.score(TEXTS)
    eager = AutoModel.from_pretrained(directories[name], attn_implementation="eager").eval()
    for texts in (TEXTS, ["abcd", "efgh", "ijkl", "mnop"]):  # also without padding, when there may be no mask
        ids, lengths = pad_rows([model.encode(text, max_tokens=64) for text in texts], device=CPU)
        with torch.inference_mode(), recorded_attention(model.trunk) as layers:
            model(ids, lengths)
        for row, length in enumerate(lengths.tolist()):
            with torch.inference_mode():
                output = eager(input_ids=ids[row : row + 1, :length], output_attentions=True)
            found = layers[0].weights(row, torch.arange(length))[..., :length]
            assert torch.allclose(found, output.attentions[-1][0], atol=1e-5)
            assert not torch.allclose(found, output.attentions[0][0], atol=1e-3) or length == 1, "twin: another layer"
    assert model.score(TEXTS) == before


@pytest.mark.parametrize(("name", "pooling"), [("bert", "mean"), ("bert", "cls"), ("bert", "last"), ("llama", "last")])
def test_character_attention_is_the_pooled_row_over_the_response(directories, name, pooling):
    model = RewardModel.build(directories[name], pooling=pooling)
    eager = AutoModel.from_pretrained(directories[name], attn_implementation="eager").eval()
    found = model.character_attention(TEXTS, prompt="is it ", max_tokens=64)
    for text, characters in zip(TEXTS, found, strict=True):
        ids = torch.tensor([model.encode(text, prompt="is it ", max_tokens=64)])
        with torch.inference_mode():
            heads = eager(input_ids=ids, output_attentions=True).attentions[-1][0]
        rows = {"mean": heads.mean((0, 1)), "cls": heads[:, 0].mean(0), "last": heads[:, -1].mean(0)}
        wanted = {key: row[6 : 6 + len(text)] / row[6 : 6 + len(text)].sum() for key, row in rows.items()}
        assert characters == pytest.approx(wanted[pooling].numpy(), abs=1e-5)
        twin = wanted["mean" if pooling != "mean" else "cls"].numpy()
        assert characters != pytest.approx(twin, abs=1e-4) or len(text) == 1, "twin: another position"


def test_what_was_cut_off_gets_nothing_and_an_empty_text_has_nothing(directories):
    model = RewardModel.build(directories["llama"])
    cut, empty = model.character_attention(["zzzzzzzzzz" + "abcdefgh", ""], max_tokens=9)
    assert cut[:10].tolist() == [0.0] * 10
    assert (cut[10:] > 0).all()
    assert empty.tolist() == []


def test_tokens_know_their_characters_of_the_response(tmp_path):
    tokenizer = byte_tokenizer(("Ġ", "a"), ("a", "b"))
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    AutoModel.from_config(
        AutoConfig.for_model("llama", vocab_size=len(tokenizer), num_key_value_heads=2, **settings)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = RewardModel.build(str(tmp_path))
    text, byte = "abé", (2, 3)
    assert model.spans(text, max_tokens=64) == [(0, 2), byte, byte, (0, 0)], "ab, two bytes of one letter, EOS"
    # The prompt's last character and the response's first are one token, which counts for its part of the response.
    assert model.spans(text, prompt="xxa ", max_tokens=64) == [(0, 0)] * 3 + [(0, 1), (1, 2), byte, byte, (0, 0)]
    assert model.spans(text, prompt="xxa ", max_tokens=3) == [byte, byte, (0, 0)]
    assert len(model.encode(text, prompt="xxa ", max_tokens=3)) == 3
    chat = [{"role": "user", "content": "ab"}]
    model.tokenizer.chat_template = "{% for m in messages %}#{{ m.role }}\n{{ m.content | trim }}<eos>{% endfor %}"
    for answer, wanted in ((" ab\n", [(1, 3)]), (text, [(0, 2), byte, byte])):
        spans, ids = (read(answer, prompt=chat, max_tokens=64) for read in (model.spans, model.encode))
        assert spans == [(0, 0)] * (len(ids) - len(wanted) - 1) + [*wanted, (0, 0)]
        assert model.spans(answer, prompt=chat, max_tokens=2) == [wanted[-1], (0, 0)]


def test_models_that_cannot_tell_say_so(directories, tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_labels": 1, "vocab_size": 40}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    trunk = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bart", **sizes, **heads))
    with (
        pytest.raises(ValueError, match="no encoder-decoder, got BartForSequenceClassification"),
        recorded_attention(trunk),
    ):
        pass
    model = RewardModel.build(directories["llama"])
    model.pooling = "classifier"
    with pytest.raises(ValueError, match="the first token or the mean is pooled, got the decoder LlamaModel"):
        model._pooled(3)


# --- from characters to the policy's tokens ---


def covers_the_response(ends) -> None:
    """The module's worked example, and an emoji of four bytes, of which the last token completes it."""
    tokenizer = byte_tokenizer(("Ġ", "c"), ("a", "f"), ("Ġc", "af"), ("o", "k"), ("Ġ", "ok"))
    ids = [*tokenizer(" café ok").input_ids, tokenizer.eos_token_id]
    assert tokenizer.convert_ids_to_tokens(ids)[::3] == ["Ġcaf", "Ġok"]
    assert ends(tokenizer, ids, " café ok") == [4, 4, 5, 8, 8]
    smile = "a\U0001f642b"
    assert ends(tokenizer, tokenizer(smile).input_ids, smile) == [1, 1, 1, 1, 2, 3]
    long = "".join(f"{smile * (index % 3)} café{index}" for index in range(30))
    ids = [token for piece in tokenizer(long).input_ids for token in (piece, tokenizer.eos_token_id)[: 1 + piece % 2]]
    texts = [tokenizer.decode(ids[:count], skip_special_tokens=True) for count in range(1, len(ids) + 1)]
    assert ends(tokenizer, ids, long) == [len(os.path.commonprefix([found, long])) for found in texts]  # noqa: RUF071
    broken = tokenizer("aéb").input_ids
    del broken[2]  # half a letter stays half a letter
    assert ends(tokenizer, broken, "a\ufffdb") == [1, 2, 3]


def token_by_token(tokenizer, ids, text):
    """Planted bug: tokens decoded alone, so that half a letter counts as a whole one."""
    return np.cumsum([len(tokenizer.decode([token], skip_special_tokens=True)) for token in ids]).tolist()


def with_special_tokens(tokenizer, ids, text):
    return [len(tokenizer.decode(ids[: count + 1])) for count in range(len(ids))]


def shares_by_hand(shares) -> None:
    weights = np.array([0.0, 1.0, 2.0, 1.0, 4.0])
    assert shares(weights, [2, 2, 3, 5, 5]).tolist() == [0.125, 0.0, 0.25, 0.625, 0.0]
    assert shares(weights / 8, [5]).tolist() == [1.0]
    assert shares(np.zeros(3), [1, 3]).tolist() == [0.0, 1.0], "nothing was read: as without credit"
    assert shares(np.zeros(0), [0]).tolist() == [1.0], "EOS alone"


CHECKS = (
    Check(
        id="C9-characters",
        run=covers_the_response,
        part=token_ends,
        twins={"token-by-token": token_by_token, "special-tokens-shown": with_special_tokens},
    ),
    Check(
        id="C9-shares",
        run=shares_by_hand,
        part=token_shares,
        twins={
            "one-late": lambda weights, ends: token_shares(weights, [0, *ends[:-1]]),
            "unnormalised": lambda weights, ends: np.diff(np.append(0, np.append(0, weights.cumsum())[ends])),
        },
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


def test_another_tokenizer_is_noticed():
    with pytest.raises(ValueError, match="response_text must be what the policy's tokenizer makes of response_ids"):
        token_ends(byte_tokenizer(), byte_tokenizer()("abc").input_ids, "abd")


# --- the worker ---

RESPONSES = {"one": [14, 13, 4, 28], "b b": [1, 26, 1], "a": [0]}


def rules() -> None:
    module = types.ModuleType("credit_rules")

    def vowels(prompts, completions, **columns):
        assert [len(ids) >= len(text) for text, ids in zip(completions, columns["completion_ids"], strict=True)]
        assert set(columns["topic"]) == {"two"}
        return [None if text == "on" else float(sum(text.count(vowel) for vowel in "aeo")) for text in completions]

    module.vowels = vowels
    sys.modules["credit_rules"] = module


rules()


def rollouts(responses: dict[str, list[int]] = RESPONSES, *, group: str = "0/p") -> pa.Table:
    rows = [
        {
            "prompt_id": "p",
            "prompt": "abc",
            "prompt_ids": [0, 1, 2],
            "extras": json.dumps({"topic": "two"}),
            "run_id": "run",
            "incarnation": 0,
            "group_id": group,
            "sample_index": index,
            "lease_id": 1,
            "response_ids": ids,
            "response_text": text,
            "logprobs": [-0.5] * len(ids),
            "policy_versions": [4] * len(ids),
            "loss_mask": [True] * len(ids),
            "finish_reason": "eos" if ids[-1] == 28 else "length",
        }
        for index, (text, ids) in enumerate(responses.items())
    ]
    return pa.Table.from_pylist(rows, schema=ROLLOUTS)


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory) -> str:
    return materialize(policy(), seed=3, cache_dir=str(tmp_path_factory.mktemp("reference")))


@pytest.fixture(scope="module")
def reward_models(directories, tmp_path_factory) -> list[str]:
    found = [str(tmp_path_factory.mktemp(f"reward{seed}")) for seed in range(2)]
    for seed, directory in enumerate(found):
        RewardModel.build(directories["bert"], seed=seed, pooling=("mean", "cls")[seed]).save(directory)
    return found


def worker(component: dict, kind: str | None, policy_dir: str | None) -> RewardWorker:
    credit = {"credit": {"component": "judge", "kind": kind}} if kind is not None else {}
    return RewardWorker(
        reward=RewardConfig.model_validate({"components": {"judge": component}, **credit}),
        policy=policy(),
        policy_dir=policy_dir,
        temperature=1.0,
        device="cpu",
        num_threads=0,
    )


def test_potentials_are_the_judge_s_scores_of_prefixes(policy_dir):
    judge = worker({"function": "credit_rules:vowels"}, "potential", policy_dir)
    scored, _ = judge.score(rollouts())
    assert [dict(row)["judge"] for row in scored["components"].to_pylist()] == [2.0, 0.0, 1.0]
    # o, on (does not apply), one, one and EOS; b, "b ", "b b"; a
    assert scored["token_scores"].to_pylist() == [[1.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0], [1.0]]


def test_a_model_s_potentials_are_its_scores_of_prefixes(policy_dir, reward_models):
    scored, _ = worker({"model": reward_models[0]}, "potential", policy_dir).score(rollouts())
    model = RewardModel.load(reward_models[0], device=CPU)
    for found, texts in zip(scored["token_scores"].to_pylist(), (["o", "on", "one", "one"], ["b", "b ", "b b"], ["a"]),
                            strict=True):  # fmt: skip
        assert found == pytest.approx(model.score(["abc" + text for text in texts]), abs=1e-5)
    wholes = [row[-1] for row in scored["token_scores"].to_pylist()]
    assert wholes == [dict(row)["judge"] for row in scored["components"].to_pylist()], "the same judgement to the bit"


def test_shares_are_the_ensemble_s_mean_attention_per_token(policy_dir, reward_models):
    component = {"model": reward_models[0], "ensemble": [reward_models[1]]}
    scored, _ = worker(component, "attention", policy_dir).score(rollouts())
    maps = [
        RewardModel.load(directory, device=CPU).character_attention(list(RESPONSES), prompt="abc")
        for directory in reward_models
    ]
    assert not np.allclose(maps[0][0], maps[1][0], atol=1e-4)
    for index, shares in enumerate(scored["token_scores"].to_pylist()):
        mean = (maps[0][index] + maps[1][index]) / 2
        assert shares == pytest.approx([*mean, 0.0][: len(shares)], abs=1e-6), "one character each, none for EOS"
        assert sum(shares) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["attention", "potential"])
def test_a_group_gets_the_same_bits_again_and_after_others(kind, policy_dir, reward_models):
    component = {"model": reward_models[0]}
    first = worker(component, kind, policy_dir).score(rollouts())
    other = worker(component, kind, policy_dir)
    other.score(rollouts({"hello there": [7, 4, 11, 11, 14, 26, 19, 7, 4, 17, 4]}, group="0/q"))
    assert [table.equals(again) for table, again in zip(first, other.score(rollouts()), strict=True)] == [True, True]
    without, samples = worker(component, None, policy_dir).score(rollouts())
    assert without["token_scores"].null_count == without.num_rows
    assert without.drop_columns(["token_scores"]).equals(first[0].drop_columns(["token_scores"]))
    assert samples.equals(first[1]), "credit changes nothing else"


def test_credit_needs_the_tokenizer_that_sampled(policy_dir):
    component = {"function": "credit_rules:vowels"}
    with pytest.raises(ValueError, match=r"reward.credit must come with the policy's directory, got none"):
        worker(component, "potential", None)
    with pytest.raises(RewardError, match=r"'judge', prompt 'p': response_text must be what the policy's tokenizer"):
        worker(component, "potential", policy_dir).score(rollouts({"two": [14, 13, 4]}))


def test_an_ensemble_of_one_is_its_member(reward_models):
    member = RewardModel.load(reward_models[1], device=CPU).character_attention(TEXTS)
    ensemble = Ensemble.load(reward_models[1:], device=CPU, dtype=torch.float32)
    found = ensemble.character_attention(TEXTS, prompt=None, max_tokens=512)
    assert all(np.array_equal(*pair) for pair in zip(found, member, strict=True))


# --- the settings ---


def test_a_part_is_at_most_the_whole():
    assert CreditConfig(component="judge", kind="potential", coef=3.0).coef == 3.0
    with pytest.raises(ValueError, match="coef must be at most 1 with kind attention, got 3"):
        CreditConfig(component="judge", kind="attention", coef=3.0)
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        CreditConfig(component="judge", kind="potential", coef=-1.0)
    settings = CreditConfig(component="judge", kind="attention")
    assert CreditConfig.model_validate_json(settings.model_dump_json()) == settings
