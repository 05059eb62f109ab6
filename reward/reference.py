"""The reference policy: the frozen network that the policy is kept near."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from actors.config import PolicyConfig
from actors.packed_linear import pack
from actors.policy import load_model, resolve_dtype
from actors.scoring import reference_logprobs, scorer_of
from reward.shared_rows import own_tokens


class ReferencePolicy:
    """Log-probs of responses under the policy that training started from."""

    version = 0
    """Grows when the reference is replaced."""

    def __init__(self, directory: str, policy: PolicyConfig, *, temperature: float, device: torch.device) -> None:
        self._temperature = temperature
        self._model = load_model(
            directory,
            dtype=resolve_dtype(policy.dtype, device),
            device=device,
            trust_remote_code=policy.trust_remote_code,
        ).requires_grad_(False)
        scorer_of(self._model)  # tries out now, not at the first group, how the model may be asked
        if policy.pack_weights:
            pack(self._model, is_final=True)

    def logprobs(self, prompt_ids: Sequence[int], responses: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return the log-probs of one group's responses at the run's temperature: [R] float32 each."""
        return reference_logprobs(
            self._model,
            prompt_ids,
            responses,
            temperature=self._temperature,
            row_tokens=row_tokens(self._model, len(prompt_ids)),
        )


def row_tokens(model: PreTrainedModel, num_prompt: int) -> int:
    """Return after how many tokens a group of a prompt of that length goes on in another row."""
    return num_prompt + own_tokens(num_prompt, hidden_size=model.config.get_text_config().hidden_size)
