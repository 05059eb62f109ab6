"""From what a judge says about characters or prefixes to numbers per token of the policy.

The judge's tokens are not the policy's.  Both are laid over the response's characters:

    response            " café ok"        9 bytes, 8 characters
    policy's tokens     " caf"  "é" (2 bytes, 1st)  (2nd)  " ok"  EOS
    token_ends            4       4                   5      8     8
    prefixes            " caf"  " caf"            " café" " café ok" (all)

A character that several tokens make belongs to the one that completes it; a token without characters gets nothing.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

_WINDOW = 16
"""Tokens decoded again and again until their text is settled; all of them would take time in the square of R."""
_CONTEXT = 8
"""Tokens decoded before these: a decoder may treat the first token of a text differently."""


def token_ends(tokenizer: PreTrainedTokenizerBase, response_ids: Sequence[int], text: str) -> list[int]:
    """Return for each token how many characters of the response's text are there with it and those before it.

    Args:
        tokenizer: The policy's.
        response_ids: [R], at least one.
        text: What the ids decode to, without special tokens.

    Raises:
        ValueError: if they decode to something else.
    """
    ends: list[int] = []
    is_whole = True
    # Up to token `settled` the text is there to the letter; only what follows is decoded, with some tokens before it.
    settled, there, before = 0, 0, ""
    for count in range(1, len(response_ids) + 1):
        found = _decode(tokenizer, response_ids[max(0, settled - _CONTEXT) : count])[len(before) :]
        is_whole = text.startswith(found, there)  # not so while a character is unfinished: then it is a stand-in
        end = there + (len(found) if is_whole else _num_common(found, text[there : there + len(found)]))
        ends.append(max([end, *ends[-1:]]))
        if is_whole and count - settled >= _WINDOW:
            context = _decode(tokenizer, response_ids[max(0, count - _CONTEXT) : count])
            if context:
                settled, there, before = count, end, context
    if not is_whole or ends[-1] != len(text):
        raise ValueError(
            f"response_text must be what the policy's tokenizer makes of response_ids, got {text!r:.80} and "
            f"{_decode(tokenizer, response_ids)!r:.80}; credit needs the tokenizer that sampled"
        )
    return ends


def token_shares(characters: np.ndarray, ends: Sequence[int]) -> np.ndarray:
    """Return how much of the whole each token has: [R] float32, at least 0, sum 1.

    Args:
        characters: [C], at least 0: the weight of each character of the response.
        ends: [R], see `token_ends`.

    Returns:
        All for the last token if no character has a weight.
    """
    upto = np.concatenate([[0.0], np.cumsum(characters)])[list(ends)]
    shares = np.diff(upto, prepend=0.0)
    total = shares.sum()
    if not total > 0:
        shares = np.zeros(len(ends))
        shares[-1] = total = 1.0
    return (shares / total).astype(np.float32)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str), "one sequence decodes to one text"
    return text


def _num_common(first: str, second: str) -> int:
    """Return how many characters two texts share from their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))
