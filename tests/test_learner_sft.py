"""Supervised fine-tuning: what is learned, from which tokens, and that it is repeatable."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.config import ArchitectureConfig, CharacterTokenizerConfig, PolicyConfig, StartConfig
from actors.encoding import PromptEncoder
from actors.policy import load_model, load_tokenizer, materialize
from learner import training
from learner.config import DataConfig, OptimizerConfig, SFTConfig, TrainingConfig
from learner.model import PolicyAndValue
from learner.optimizer import make_engine
from learner.sft import ExampleParser, NextToken, SFTExample, train

CPU = torch.device("cpu")
ARCHITECTURE = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
POLICY = PolicyConfig(
    model=ArchitectureConfig(architecture=ARCHITECTURE, tokenizer=CharacterTokenizerConfig(characters="abcdef"))
)
SUCCESSOR = {"a": "bcd", "b": "cde", "c": "def", "d": "ef", "e": "f"}


def write(path, rows: list[object]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def config(directory, data: str, **settings: object) -> SFTConfig:
    options = {"epochs": 30, "batch_size": 4, "optimizer": OptimizerConfig(learning_rate=1e-2), "max_tokens": 16}
    return SFTConfig(
        output=str(directory / "out"),
        policy=POLICY,
        data=DataConfig(path=data),
        training=TrainingConfig(**{**options, **settings}),
    )


@pytest.fixture
def walks(tmp_path) -> str:
    return write(tmp_path / "walks.jsonl", [{"prompt": k, "completion": v} for k, v in SUCCESSOR.items()])


def test_completions_are_learned_and_end_with_eos(tmp_path, walks):
    result = train(config(tmp_path, walks), cache_dir=str(tmp_path))
    assert result.losses[-1] < 0.05 < result.losses[0]
    model = AutoModelForCausalLM.from_pretrained(result.directory).eval()
    tokenizer = load_tokenizer(result.directory)
    encoder = PromptEncoder(tokenizer)
    for prompt, completion in SUCCESSOR.items():
        ids = torch.tensor([encoder.encode(prompt)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        assert out[0, 1:].tolist() == encoder.encode_completion(completion)
    with open(os.path.join(result.directory, "metrics.jsonl")) as file:
        journal = [json.loads(line) for line in file]
    assert [row["loss"] for row in journal] == list(result.losses)
    assert len(journal) == 30 * 2
    assert os.path.isfile(os.path.join(result.directory, "training.yaml"))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path, walks):
    def weights(**settings: object) -> dict[str, torch.Tensor]:
        result = train(config(tmp_path, walks, epochs=2, **settings), cache_dir=str(tmp_path))
        return load_file(os.path.join(result.directory, "model.safetensors"))

    first, again, other = weights(), weights(), weights(seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def objective(examples: list[SFTExample], tmp_path) -> tuple[NextToken, object]:
    model = load_model(materialize(POLICY, seed=0, cache_dir=str(tmp_path)), dtype=torch.float32, device=CPU)
    module = PolicyAndValue(model, has_value_head=False)
    engine = make_engine(module, OptimizerConfig(), backend="local", zero_stage=0)
    return NextToken(module, examples, CPU), engine


def test_the_loss_is_cross_entropy_of_the_trained_tokens_alone(tmp_path):
    examples = [
        SFTExample(prompt_ids=[0, 1], response_ids=[2, 3, 7], is_trained=[True, True, True]),
        SFTExample(prompt_ids=[4], response_ids=[5, 7, 1, 0, 7], is_trained=[True, True, False, False, True]),
    ]
    next_token, engine = objective(examples, tmp_path)
    assert next_token.units == [3, 3]
    loss = next_token.loss_sum(engine, [0, 1])
    model = engine.module.policy
    expected = 0.0
    for example in examples:
        ids = torch.tensor([example.prompt_ids + example.response_ids])
        labels = [-100] * len(example.prompt_ids)
        labels += [i if t else -100 for i, t in zip(example.response_ids, example.is_trained, strict=True)]
        expected += float(model(ids, labels=torch.tensor([labels])).loss.detach()) * 3
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_microbatches_do_not_change_the_gradient(tmp_path):
    examples = [
        SFTExample(prompt_ids=[0] * n, response_ids=[1] * (5 - n) + [7], is_trained=[True] * (6 - n))
        for n in range(1, 5)
    ]

    def gradient(max_tokens: int, *, per_part: bool = False) -> torch.Tensor:
        next_token, engine = objective(examples, tmp_path)
        next_token.microbatch_tokens = max_tokens
        if per_part:
            for part in training.microbatches(range(4), next_token.lengths, max_tokens=max_tokens):
                engine.backward(next_token.loss_sum(engine, part) / sum(next_token.units[i] for i in part) / 4)
        else:
            training._accumulate(engine, next_token, range(4))
        return engine.module.policy.get_input_embeddings().weight.grad.clone()

    assert torch.allclose(gradient(1000), gradient(6), atol=1e-6)
    # The twin that averages the averages of its parts weighs tokens of short completions more.
    assert not torch.allclose(gradient(1000), gradient(6, per_part=True), atol=1e-4)


def test_every_example_is_in_every_epoch_once_and_batches_have_similar_lengths():
    lengths = [index % 50 for index in range(203)]
    batches = training._batches(lengths, 8, seed=0, epoch=0)
    assert sorted(index for batch in batches for index in batch) == list(range(203))
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert sum(spread) / len(spread) < 5
    assert batches != training._batches(lengths, 8, seed=0, epoch=1)


def test_malformed_rows_are_quarantined_and_counted(tmp_path):
    good = {"prompt": "a", "completion": "b"}
    bad = [
        ({"prompt": "a"}, "must have prompt and completion"),
        ({"prompt": "a", "completion": 3}, "completion must be a string"),
        ({"prompt": 3, "completion": "a"}, "prompt must be a string"),
        ({"prompt": "", "completion": "a"}, "empty prompt"),
        ({"prompt": "a", "completion": "b" * 20}, "at most 16 tokens, got 22"),
        ({"prompt": "a", "completion": "Z"}, "alphabet"),
        ({"messages": []}, "non-empty list"),
        ("{", "must be JSON"),
    ]
    path = write(tmp_path / "data.jsonl", [good, *(row for row, _ in bad)])
    result = train(config(tmp_path, path, epochs=1), cache_dir=str(tmp_path))
    assert result.num_examples == 1
    assert [row.line for row in result.quarantined] == list(range(2, 10))
    for row, (_, reason) in zip(result.quarantined, bad, strict=True):
        assert reason in row.reason
    strict = config(tmp_path, path).model_copy(update={"data": DataConfig(path=path, strict=True)})
    with pytest.raises(ValueError, match="8 of 9 rows are malformed"):
        train(strict, cache_dir=str(tmp_path))


def test_messages_have_a_loss_on_what_the_assistant_says(tmp_path):
    tokenizer = load_tokenizer(materialize(POLICY, seed=0, cache_dir=str(tmp_path)))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'f' if m.role == 'user' else 'e' }}{{ m.content }}"
        "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}e{% endif %}"
    )
    encoder = PromptEncoder(tokenizer)
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    row = training.RawRow(ordinal=0, file="f", line=1, value={"messages": [*turns, *turns]})
    example = ExampleParser(encoder, max_tokens=99)(row)
    assert example.prompt_ids == encoder.encode(turns[:1])
    assert tokenizer.decode(example.response_ids) == "c<eos>fabec<eos>"
    assert example.is_trained == [True, True, False, False, False, False, True, True]


def test_a_setting_that_would_be_ignored_is_an_error(tmp_path, walks):
    ignored = config(tmp_path, walks)
    ignored = ignored.model_copy(update={"policy": POLICY.model_copy(update={"start": StartConfig(config="x.yaml")})})
    with pytest.raises(ValueError, match=r"policy\.start must not be set"):
        train(ignored, cache_dir=str(tmp_path))


def test_the_output_replaces_an_earlier_result_and_nothing_else(tmp_path, walks):
    precious = tmp_path / "out"
    precious.mkdir()
    (precious / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(ValueError, match=r"without training\.yaml"):
        train(config(tmp_path, walks, epochs=1), cache_dir=str(tmp_path))
    assert os.listdir(precious) == ["thesis.txt"]
