"""Reward models: a scalar head on any Hugging Face encoder or decoder, with a normalisation that is part of the model.

score = gain * (w . pooled(trunk(text)) + b) + bias.  The model reads text with its own tokenizer.  Padding is on the
right and known by lengths, never by comparing ids with the pad token; an over-long text keeps its end.  Where a
decoder's last token is read, a group's texts share a row that holds once what they begin with (`reward.shared_rows`).
"""

import json
import logging
import math
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BatchEncoding,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from actors.encoding import Message, Prompt, PromptEncoder
from actors.policy import attention_implementation, load_tokenizer, local_directory, without_dropout
from actors.rows import Layout
from reward.attention import recorded_attention
from reward.shared_rows import SharedRow, layout_of, shared_rows

logger = logging.getLogger(__name__)

Pooling = Literal["mean", "cls", "last", "classifier"]
"""How token states become one vector; `classifier`: the trunk is a whole sequence classifier and returns the scalar."""

_SETTINGS = "reward_model.json"
_HEAD = "head.safetensors"
_MIN_ROWS = 4  # fewer rows take another matrix kernel, so a group's bits would depend on its size
_MAX_ROWS = 64


class RewardModel(nn.Module):
    """Reads texts, returns one number for each."""

    gain: torch.Tensor
    bias: torch.Tensor

    def __init__(
        self, trunk: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, pooling: Pooling, has_eos: bool
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.has_eos = has_eos  # texts are ended by EOS, so that the last token has seen that nothing follows
        width = 1 if pooling == "classifier" else trunk.config.get_text_config().hidden_size
        self.head = nn.Linear(width, 1)
        self.register_buffer("gain", torch.ones(1))
        self.register_buffer("bias", torch.zeros(1))
        self._encoder = PromptEncoder(tokenizer)

    @classmethod
    def build(
        cls,
        model: str,
        *,
        pooling: Literal["auto", "mean", "cls", "last"] = "auto",
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> "RewardModel":
        """Return a new reward model on a pretrained trunk; the head is N(0, 1 / (d + 1)), its bias 0."""
        directory = local_directory(model, what="model")
        config = _config(directory, trust_remote_code)
        chosen: Pooling = pooling if pooling != "auto" else "last" if is_decoder(config) else "mean"
        tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        trunk = AutoModel.from_pretrained(directory, **_loading(config, trust_remote_code))
        built = cls(trunk, tokenizer, pooling=chosen, has_eos=chosen == "last" and tokenizer.eos_token is not None)
        width = built.head.in_features
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            built.head.weight.normal_(0.0, 1.0 / math.sqrt(width + 1), generator=generator)
            built.head.bias.zero_()
        return built.eval()

    @classmethod
    def load(
        cls, model: str, *, device: torch.device, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
    ) -> "RewardModel":
        """Return a saved reward model, or a Hugging Face sequence classifier with one label as such.

        Raises:
            ValueError: if the directory holds neither.
        """
        directory = local_directory(model, what="reward model")
        loading = _loading(_config(directory, trust_remote_code), trust_remote_code)
        tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        if not os.path.isfile(os.path.join(directory, _SETTINGS)):
            loaded = _from_classifier(directory, tokenizer, loading)
        else:
            with open(os.path.join(directory, _SETTINGS), encoding="utf-8") as file:
                settings = json.load(file)
            kind = AutoModelForSequenceClassification if settings["pooling"] == "classifier" else AutoModel
            loaded = cls(kind.from_pretrained(directory, **loading), tokenizer, **settings)
            loaded._load_head(os.path.join(directory, _HEAD))
        loaded = loaded.to(device=device, dtype=dtype).eval()
        logger.debug("%s reads a group in %s rows", directory, loaded.layout)  # tried out now, not at the first group
        return loaded

    def save(self, directory: str) -> None:
        """Write trunk and tokenizer as Hugging Face files, head and normalisation as safetensors, settings as JSON."""
        os.makedirs(directory, exist_ok=True)
        self.trunk.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        rest = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("trunk.")}
        save_file({name: tensor.contiguous() for name, tensor in rest.items()}, os.path.join(directory, _HEAD))
        with open(os.path.join(directory, _SETTINGS), "w", encoding="utf-8") as file:
            json.dump({"pooling": self.pooling, "has_eos": self.has_eos}, file)

    def encode(self, text: str, *, prompt: Prompt | None = None, max_tokens: int) -> list[int]:
        """Return the ids of a text, at most `max_tokens`, the end kept.

        With a prompt it is read as the answer: behind a plain prompt as it stands, after chat messages in the model's
        own chat template where it has one, else line by line.  Special tokens in a text stay text.
        """
        conversation = self._conversation(text, prompt)
        if conversation is not None:
            return self._encoder.encode_conversation(conversation)[0][-max_tokens:]
        ids = self._read_plain(_before(prompt) + text, max_tokens).input_ids
        return [*ids, self.tokenizer.eos_token_id] if self.has_eos else ids

    def spans(self, text: str, *, prompt: Prompt | None = None, max_tokens: int) -> list[tuple[int, int]]:
        """Return which characters of a text each id of `encode` stands for, first and past the last.

        Prompt, template and EOS stand for none of them.  A token that begins in the prompt stands for what it has of
        the text.

        Raises:
            ValueError: if the tokenizer does not tell.
        """
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"a reward model's tokenizer must be a fast one to tell its tokens' characters, got "
                f"{type(self.tokenizer).__name__}; use another model or credit of kind potential"
            )
        conversation = self._conversation(text, prompt)
        if conversation is not None:
            return self._chat_spans(conversation)[-max_tokens:]
        before = _before(prompt)
        offsets = self._read_plain(before + text, max_tokens, return_offsets_mapping=True).offset_mapping
        spans = [(max(start - len(before), 0), max(end - len(before), 0)) for start, end in offsets]
        return [*spans, (0, 0)] if self.has_eos else spans

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return normalised scores.

        Args:
            input_ids: [B, T], padded on the right with any id.
            lengths: [B], tokens of each text.

        Returns:
            [B], in the head's dtype.
        """
        return self._value(self._pooled_states(input_ids, lengths))

    def score(self, texts: Sequence[str], *, prompt: Prompt | None = None, max_tokens: int = 512) -> list[float]:
        """Return the scores of one group's texts; the bits depend on these texts alone."""
        return self.score_ids(self._encoded(texts, prompt, max_tokens))

    @torch.inference_mode()
    def score_ids(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Return the scores of one group's texts as token ids, none empty; the bits depend on these texts alone."""
        rows: list[SharedRow] = []
        alone = list(range(len(texts)))
        if self.layout == "shared":
            rows, alone = shared_rows(texts, hidden_size=self.trunk.config.get_text_config().hidden_size)
        scores = [0.0] * len(texts)
        for row in rows:
            _put(scores, row.indices, self._value(row.last_states(self.trunk)))
        for start in range(0, len(alone), _MAX_ROWS):
            indices = alone[start : start + _MAX_ROWS]
            _put(scores, indices, self(*self._padded([texts[index] for index in indices])))
        return scores

    @cached_property
    @torch.inference_mode()
    def layout(self) -> Layout:
        """How a group is read: what its texts begin with once (decoders), or each text as a row of its own."""
        if self.pooling != "last" or not is_decoder(self.trunk.config):
            return "padded"
        return layout_of(self.trunk, lambda texts: self._pooled_states(*self._padded(texts))[: len(texts)])

    @torch.inference_mode()
    def character_attention(
        self, texts: Sequence[str], *, prompt: Prompt | None = None, max_tokens: int = 512
    ) -> list[np.ndarray]:
        """Return how much the last layer looks at each character of one group's texts where its state is pooled.

        Mean over heads, and over positions where the mean of them is pooled; a token's attention is spread evenly over
        its characters.  The bits depend on these texts alone.

        Returns:
            For each text [characters] float64 that sum to 1; all 0 if nothing of the text was read.

        Raises:
            ValueError: if this model's attention cannot be told.
        """
        weights: list[np.ndarray] = []
        encoded = self._encoded(texts, prompt, max_tokens)
        for start in range(0, len(encoded), _MAX_ROWS):
            part = encoded[start : start + _MAX_ROWS]
            input_ids, lengths = self._padded(part)
            with recorded_attention(self.trunk) as layers:
                self(input_ids, lengths)
            for row, length in enumerate(lengths[: len(part)].tolist()):
                positions = self._pooled(length).to(input_ids.device)
                weights.append(layers[0].weights(row, positions).mean(dim=(0, 1)).double().cpu().numpy())
        return [
            _on_characters(row, self.spans(text, prompt=prompt, max_tokens=max_tokens), len(text))
            for row, text in zip(weights, texts, strict=True)
        ]

    def normalize(self, scores: Sequence[float]) -> None:
        """Give reference samples, whose scores these are, mean 0 and deviation 1: gain 1/sigma, bias -mu/sigma.

        Raises:
            ValueError: if the scores are all the same.
        """
        values = torch.tensor(scores, dtype=torch.float64)
        sigma, mean = float(values.std(correction=0)), float(values.mean())
        if not sigma > 0:
            raise ValueError(f"reference scores must differ, got {len(scores)} times {mean}")
        with torch.no_grad():
            self.gain.div_(sigma)
            self.bias.sub_(mean).div_(sigma)

    def _load_head(self, path: str) -> None:
        found = load_file(path)
        wanted = {name for name in self.state_dict() if not name.startswith("trunk.")}
        if set(found) != wanted:
            raise ValueError(f"a reward model's head must hold {sorted(wanted)}, got {sorted(found)} ({path})")
        self.load_state_dict(found, strict=False)

    def _conversation(self, text: str, prompt: Prompt | None) -> list[Message] | None:
        """Return prompt and answer as messages, None where they are read as plain text."""
        if isinstance(prompt, list) and self.tokenizer.chat_template is not None and text.strip():
            return [*prompt, {"role": "assistant", "content": text}]
        return None

    def _read_plain(self, text: str, max_tokens: int, **options: bool) -> BatchEncoding:
        self.tokenizer.truncation_side = "left"  # drops the beginning, keeps what the tokenizer puts around a text
        limit = max_tokens - self.has_eos
        return self.tokenizer(text, truncation=True, max_length=limit, split_special_tokens=True, **options)

    def _chat_spans(self, conversation: list[Message]) -> list[tuple[int, int]]:
        """Return the spans of a conversation's ids in the last message, which its template may strip."""
        ids, said = self._encoder.encode_conversation(conversation)
        start = len(said) - said[::-1].index(False) if False in said else 0
        text, shown = conversation[-1]["content"], ids[start:-1]  # EOS is the last id of an answer
        for candidate in (text, text.lstrip(), text.rstrip(), text.strip()):
            read = self.tokenizer(
                candidate, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )
            if read.input_ids == shown:
                shift = text.index(candidate)
                spans = [(first + shift, end + shift) for first, end in read.offset_mapping]
                return [*[(0, 0)] * start, *spans, (0, 0)]
        raise ValueError(f"a chat template must show the answer as it is, got another one for {text!r:.80}; change it")

    def _encoded(self, texts: Sequence[str], prompt: Prompt | None, max_tokens: int) -> list[list[int]]:
        """Return the ids of one group's texts; one without any token is read as the filler."""
        return [self.encode(text, prompt=prompt, max_tokens=max_tokens) or [self._filler] for text in texts]

    def _padded(self, texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (padded ids, lengths) of texts in their order; the last rows may stand for none."""
        return pad_rows([*texts, *[texts[-1]] * (_MIN_ROWS - len(texts))], device=self.head.weight.device)

    def _pooled_states(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return what the head reads, [B, H]; see `forward`."""
        is_text = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
        options = {"use_cache": False} if is_decoder(self.trunk.config) else {}
        output = self.trunk(input_ids=input_ids, attention_mask=is_text.long(), **options)
        return output.logits if self.pooling == "classifier" else _pool(output.last_hidden_state, is_text, self.pooling)

    def _value(self, pooled: torch.Tensor) -> torch.Tensor:
        """Return [B] normalised scores of [B, H]."""
        return self.gain * self.head(pooled)[:, 0] + self.bias

    def _pooled(self, length: int) -> torch.Tensor:
        """Return the positions of a text of `length` tokens whose states are pooled."""
        config = self.trunk.config.to_dict()
        pooling = "cls" if self.pooling == "classifier" else self.pooling
        if self.pooling == "classifier" and config.get("classifier_pooling") == "mean":  # ModernBERT can do both
            pooling = "mean"
        if self.pooling == "classifier" and is_decoder(self.trunk.config):
            raise ValueError(
                f"a classifier's attention can be told where the first token or the mean is pooled, got the decoder "
                f"{type(self.trunk).__name__}; use another model or credit of kind potential"
            )
        return {"mean": torch.arange(length), "cls": torch.tensor([0]), "last": torch.tensor([length - 1])}[pooling]

    @property
    def _filler(self) -> int:
        """The id read in place of a text without any token."""
        return self.tokenizer.eos_token_id or 0


def pad_rows(rows: Sequence[Sequence[int]], *, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ([B, T] int64 ids padded on the right with 0, [B] lengths)."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    padded = [[*row, *[0] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, device=device), torch.tensor(lengths, device=device)


def _put(scores: list[float], indices: Sequence[int], found: torch.Tensor) -> None:
    """Write what was found for the texts `indices`; rows behind theirs stand for none."""
    for index, score in zip(indices, found.float().tolist(), strict=False):
        scores[index] = score


def _before(prompt: Prompt | None) -> str:
    """Return what a text is read behind, without a chat template."""
    return prompt if isinstance(prompt, str) else "".join(m["content"] + "\n" for m in prompt or ())


def is_decoder(config: PreTrainedConfig) -> bool:
    """Return whether a model reads left to right only; BERT's family has both kinds of head and is an encoder."""
    kind = config.model_type
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _on_characters(weights: np.ndarray, spans: Sequence[tuple[int, int]], num_characters: int) -> np.ndarray:
    """Spread each token's weight evenly over its characters, and make them sum to 1 where there are any."""
    characters = np.zeros(num_characters)
    for weight, (start, end) in zip(weights, spans, strict=False):  # padding stands behind the text
        characters[start:end] += weight / max(1, end - start)
    total = characters.sum()
    return characters / total if total > 0 else characters


def _pool(states: torch.Tensor, is_text: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Return [B, H] of [B, T, H]."""
    if pooling == "cls":
        return states[:, 0]
    lengths = is_text.sum(dim=1)
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), lengths - 1]
    return (states * is_text[..., None]).sum(dim=1) / lengths[:, None]


def _config(directory: str, trust_remote_code: bool) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
    return without_dropout(config)


def _loading(config: PreTrainedConfig, trust_remote_code: bool) -> dict[str, Any]:
    return {
        "config": config,
        "dtype": torch.float32,
        "attn_implementation": attention_implementation(config),
        "use_safetensors": True,
        "trust_remote_code": trust_remote_code,
        "local_files_only": True,
    }


def _from_classifier(directory: str, tokenizer: PreTrainedTokenizerBase, loading: dict[str, Any]) -> RewardModel:
    config = loading["config"]
    architectures = config.architectures or ["none"]
    if config.num_labels != 1 or not architectures[0].endswith("ForSequenceClassification"):
        raise ValueError(
            f"a reward model must be one of `concord reward` or a sequence classifier with one label, "
            f"got {architectures[0]} with {config.num_labels} labels ({directory}); train one with `concord reward`"
        )
    classifier = AutoModelForSequenceClassification.from_pretrained(directory, **loading)
    # Decoders are taken apart, because Hugging Face finds their last token by comparing ids with the pad token.
    last_layer = dict(classifier.named_children()).get("score")
    if isinstance(last_layer, nn.Linear):
        model = RewardModel(classifier.base_model, tokenizer, pooling="last", has_eos=False)
        weight, bias = last_layer.weight, last_layer.bias
    else:
        model = RewardModel(classifier, tokenizer, pooling="classifier", has_eos=False)
        weight, bias = torch.ones(1, 1), None
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(torch.zeros(1) if bias is None else bias)
    return model
