"""Supervised fine-tuning: next-token training on completions or on the assistant's turns.

Prompts and completions are encoded by the room that samples (`actors/encoding.py`), so the ids a policy sees here are
the ids it will see in reinforcement learning.  An example is laid out like a group with one response: only states
that predict a completion's token reach the output head, and nothing is padded where the model takes a group as one row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from actors.cache import replace_directory
from actors.dataset import Quarantined, RawRow, open_dataset
from actors.encoding import PromptEncoder, check_messages, parse_prompt
from actors.policy import load_model, load_tokenizer, materialize, resolve_dtype
from actors.prompt_row import check_unicode
from actors.rows import PromptGroup
from learner.config import SFTConfig
from learner.model import PolicyAndValue, Scoring
from learner.optimizer import OptimizerEngine, make_engine
from learner.training import (
    CHUNK_TOKENS,
    ROW_TOKENS,
    SETTINGS_FILE,
    Progress,
    fit,
    limited,
    read_examples,
    silent,
    training_device,
    write_settings,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTResult:
    """What supervised training did."""

    directory: str
    """A Hugging Face model directory with tokenizer, journal and settings."""
    num_examples: int
    losses: tuple[float, ...]
    """Nats per trained token, one per update."""
    quarantined: tuple[Quarantined, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTExample:
    """Token ids of a prompt and of what follows it, and which of the latter are trained."""

    prompt_ids: list[int]
    response_ids: list[int]
    is_trained: list[bool]


def train(config: SFTConfig, *, cache_dir: str, progress: Progress = silent) -> SFTResult:
    """Train and write the model to `config.output`, which appears at once when all is done.

    Raises:
        ValueError: for settings or data that cannot be trained on.
    """
    if config.policy.start is not None:
        raise ValueError("policy.start must not be set for supervised training, it would be ignored; remove it")
    if config.training.num_threads:
        torch.set_num_threads(config.training.num_threads)
    source = materialize(config.policy, seed=config.training.seed, cache_dir=cache_dir)
    tokenizer = load_tokenizer(source, trust_remote_code=config.policy.trust_remote_code)
    dataset = open_dataset(config.data.path, config.data.make, cache_dir=cache_dir)
    parse = ExampleParser(PromptEncoder(tokenizer), max_tokens=config.training.max_tokens)
    examples, quarantined = read_examples(dataset, parse, strict=config.data.strict)
    examples = limited(examples, config.data.limit, seed=config.training.seed)
    losses: list[float] = []

    def build(directory: str) -> None:
        model = _load(config, source)
        losses.extend(_fit(config, model, examples, directory=directory, progress=progress))
        tokenizer.save_pretrained(directory)
        write_settings(config, directory)

    directory = replace_directory(config.output, build, marker=SETTINGS_FILE)
    return SFTResult(
        directory=directory, num_examples=len(examples), losses=tuple(losses), quarantined=tuple(quarantined)
    )


class ExampleParser:
    """Makes examples of rows with `prompt` and `completion`, or with `messages`."""

    def __init__(self, encoder: PromptEncoder, *, max_tokens: int) -> None:
        self._encoder = encoder
        self._max_tokens = max_tokens

    def __call__(self, row: RawRow) -> SFTExample:
        """Return the row's example.

        Raises:
            ValueError: that says what is wrong with the row.
        """
        example = self._conversation(row.value) if "messages" in row.value else self._pair(row.value)
        length = len(example.prompt_ids) + len(example.response_ids)
        if length > self._max_tokens:
            raise ValueError(f"an example must have at most {self._max_tokens} tokens, got {length}")
        if not example.prompt_ids:
            raise ValueError("an example must have at least one token before the completion, got an empty prompt")
        return example

    def _pair(self, columns: dict[str, Any]) -> SFTExample:
        if "prompt" not in columns or "completion" not in columns:
            raise ValueError(f"a row must have prompt and completion, or messages, got columns {sorted(columns)}")
        prompt, completion = columns["prompt"], columns["completion"]
        if not isinstance(completion, str):
            raise ValueError(f"completion must be a string, got {type(completion).__name__}")
        if not isinstance(prompt, str | list):
            raise ValueError(f"prompt must be a string or a list of messages, got {type(prompt).__name__}")
        check_unicode(completion, "completion")
        ids = self._encoder.encode_completion(completion)
        parsed = parse_prompt(prompt) if isinstance(prompt, str) else check_messages(prompt)
        return SFTExample(prompt_ids=self._encoder.encode(parsed), response_ids=ids, is_trained=[True] * len(ids))

    def _conversation(self, columns: dict[str, Any]) -> SFTExample:
        ids, said = self._encoder.encode_conversation(check_messages(columns["messages"]))
        start = said.index(True)
        return SFTExample(prompt_ids=ids[:start], response_ids=ids[start:], is_trained=said[start:])


class NextToken:
    """Objective: minus the log-prob of each trained token."""

    microbatch_tokens = ROW_TOKENS

    def __init__(self, module: PolicyAndValue, examples: Sequence[SFTExample], device: torch.device) -> None:
        self._scorer = module.scorer
        self._examples = examples
        self._device = device
        self.lengths = [len(example.prompt_ids) + len(example.response_ids) for example in examples]
        self.units = [sum(example.is_trained) for example in examples]

    def loss_sum(self, engine: OptimizerEngine, examples: Sequence[int]) -> torch.Tensor:
        """Return the sum of -log p over the trained tokens of some examples."""
        chosen = [self._examples[index] for index in examples]
        groups = [PromptGroup(prompt_ids=e.prompt_ids, responses=[e.response_ids]) for e in chosen]
        row = self._scorer.row(groups).to(self._device)
        logprobs, _, _ = engine.forward(row, Scoring(temperature=1.0, chunk_tokens=CHUNK_TOKENS))
        is_trained = torch.tensor([flag for e in chosen for flag in e.is_trained], device=self._device)
        return -logprobs[is_trained].sum()


def _load(config: SFTConfig, source: str) -> PolicyAndValue:
    device = training_device()
    policy = load_model(
        source,
        dtype=resolve_dtype(config.policy.dtype, device),
        device=device,
        trust_remote_code=config.policy.trust_remote_code,
    )
    return PolicyAndValue(policy, has_value_head=False)


def _fit(
    config: SFTConfig,
    module: PolicyAndValue,
    examples: Sequence[SFTExample],
    *,
    directory: str,
    progress: Progress,
) -> list[float]:
    device, dtype = module.policy.device, module.policy.dtype
    objective = NextToken(module, examples, device)
    settings = config.training.engine
    engine = make_engine(
        module, config.training.optimizer, backend=settings.backend, zero_stage=settings.zero_stage, dtype=dtype
    )
    losses = fit(engine, objective, config.training, directory=directory, progress=progress)
    with engine.gathered(list(module.parameters())):
        module.policy.save_pretrained(directory)
    engine.close()
    return losses
