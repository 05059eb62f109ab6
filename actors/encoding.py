"""Prompts and conversations as token ids.

Chat is encoded segment by segment: the template's own text may hold special tokens, the messages' contents may not,
so a user who types `<|im_end|>` gets the characters and not the token.  Every encoding of a prompt or completion, for
sampling as for supervised training, comes from here.
"""

import json
import re
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
Prompt = str | list[Message]

ROLES = ("system", "developer", "user", "assistant", "tool")
_SENTINEL = re.compile("\ue0f0(\\d+)\ue0f1")


def check_messages(messages: Any) -> list[Message]:
    """Return `messages` if they are chat messages.

    Raises:
        ValueError: if they are not a non-empty list of objects with exactly a known `role` and a string `content`.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a non-empty list, got {messages!r:.80}")
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError(f"a message must have exactly `role` and `content`, got {message!r:.80}")
        # The role is written into the template's own text, so it must not be free text.
        if message["role"] not in ROLES:
            raise ValueError(f"a message's role must be one of {', '.join(ROLES)}, got {message['role']!r:.80}")
        if not isinstance(message["content"], str):
            raise ValueError(f"a message's content must be a string, got {message['content']!r:.80}")
    return messages


def dump_prompt(prompt: Prompt) -> str:
    """Return a prompt as the `prompt` column holds it: plain text, or messages as a JSON array."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def parse_prompt(text: str) -> Prompt:
    """Return what `dump_prompt` was given; text that reads as a JSON array of messages is chat."""
    if not text.startswith("["):
        return text
    try:
        return check_messages(json.loads(text))
    except (ValueError, RecursionError):
        return text


class PromptEncoder:
    """Encodes prompts, completions and conversations with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # What the tokenizer puts before any text (BOS, or GLM's two), without what it may put after.
        prefix = list(tokenizer("").input_ids)
        while prefix and prefix[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
            prefix.pop()
        self._prefix = prefix
        # GPT-2 uses its EOS as unknown token as well; elsewhere an unknown token in a text does no harm.
        unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id}
        self._special = frozenset(tokenizer.all_special_ids) - unknown

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt, ready for the policy to continue.

        Args:
            prompt: Plain text, which gets the tokenizer's BOS unless it already begins with it, and in which special
                tokens count as such; or messages, which get the chat template and its generation prompt.

        Raises:
            ValueError: if the prompt cannot be encoded.
        """
        if isinstance(prompt, str):
            ids = self._ids(prompt, split_special=False)
            return ids if ids[: len(self._prefix)] == self._prefix else self._prefix + ids
        return [token for ids, _ in self._segments(prompt, generation_prompt=True) for token in ids]

    def encode_completion(self, text: str) -> list[int]:
        """Return the ids of a completion, ended by EOS; special tokens in `text` stay text."""
        return [*self._ids(text, split_special=True), self._eos()]

    def encode_conversation(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation and which of them the assistant said.

        Said by the assistant are its contents and the EOS that follows each; the conversation is cut after its last
        turn, where an EOS is added if the template has none.

        Returns:
            Two lists of the same length: token ids, and true where supervised training has a loss.
        """
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"the last message must be the assistant's, got {messages[-1]['role']!r}")
        ids: list[int] = []
        said: list[bool] = []
        after_assistant = False
        for segment, index in self._segments(messages, generation_prompt=False):
            is_said = index is not None and messages[index]["role"] == "assistant"
            ids += segment
            said += [is_said] * len(segment)
            if after_assistant and segment[0] == self._eos():
                said[-len(segment)] = True
            after_assistant = is_said
        if True not in said:
            raise ValueError("the assistant must say something, got empty contents only")
        end = len(said) - said[::-1].index(True)
        if ids[end - 1] != self._eos():
            return [*ids[:end], self._eos()], [*said[:end], True]
        return ids[:end], said[:end]

    def _segments(self, messages: list[Message], *, generation_prompt: bool) -> list[tuple[list[int], int | None]]:
        segments = []
        for text, index in self._pieces(check_messages(messages), generation_prompt=generation_prompt):
            ids = self._ids(text, split_special=index is not None)
            if ids:
                segments.append((ids, index))
        return segments

    def _pieces(self, messages: list[Message], *, generation_prompt: bool) -> list[tuple[str, int | None]]:
        """Split the rendered chat into the template's text (index None) and contents (index of their message).

        Contents are replaced by sentinels before rendering.  Rendering a second time with blanks around the sentinels
        tells on which sides the template strips a content, so that it is stripped here in the same way.
        """
        rendered = self._render(messages, "{}", generation_prompt)
        padded = self._render(messages, " {} ", generation_prompt)
        pieces, padded_pieces = _SENTINEL.split(rendered), _SENTINEL.split(padded)
        missing = set(range(len(messages))) - {int(index) for index in pieces[1::2]}
        if missing or pieces[1::2] != padded_pieces[1::2]:
            raise ValueError(f"the chat template must use every message, got none of message {min(missing, default=0)}")
        result: list[tuple[str, int | None]] = [(pieces[0], None)]
        for at in range(1, len(pieces), 2):
            content = messages[int(pieces[at])]["content"]
            if _num_leading(padded_pieces[at - 1][::-1]) == _num_leading(pieces[at - 1][::-1]):
                content = content.lstrip()
            if _num_leading(padded_pieces[at + 1]) == _num_leading(pieces[at + 1]):
                content = content.rstrip()
            result += [(content, int(pieces[at])), (pieces[at + 1], None)]
        return result

    def _render(self, messages: list[Message], pattern: str, generation_prompt: bool) -> str:
        stand_ins = [
            {"role": message["role"], "content": pattern.format(f"\ue0f0{index}\ue0f1")}
            for index, message in enumerate(messages)
        ]
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "chat messages need a tokenizer with a chat template, and this has none; use plain prompts"
            )
        try:
            rendered = self.tokenizer.apply_chat_template(
                stand_ins, tokenize=False, add_generation_prompt=generation_prompt
            )
        except TemplateError as error:  # what a template's own raise_exception(...) raises
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        assert isinstance(rendered, str), "a chat template rendered without tokenizing must be text"
        return rendered

    def _ids(self, text: str, *, split_special: bool) -> list[int]:
        if not text:
            return []
        try:
            ids = self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=split_special, verbose=False
            ).input_ids
        except Exception as error:  # the tokenizers library raises plain Exception for text outside its alphabet
            raise ValueError(f"text must be in the tokenizer's alphabet, got {text!r:.80} ({error})") from error
        if split_special and not self._special.isdisjoint(ids):
            raise ValueError(f"text must not hold special tokens, got {text!r:.80}; this tokenizer cannot spell them")
        return ids

    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("a completion needs the tokenizer's end-of-sequence token, and it has none; set eos_token")
        return self.tokenizer.eos_token_id


def _num_leading(text: str) -> int:
    return len(text) - len(text.lstrip(" "))
