"""Several reward models as one judge: their mean, and how much they disagree."""

from collections.abc import Sequence

import numpy as np
import torch

from actors.encoding import Prompt
from actors.packed_linear import pack
from reward.model import RewardModel


class Ensemble:
    """One or more reward models that read the same texts."""

    def __init__(self, members: Sequence[RewardModel]) -> None:
        self._members = members

    @classmethod
    def load(
        cls, models: Sequence[str], *, device: torch.device, dtype: torch.dtype, pack_weights: bool = True
    ) -> "Ensemble":
        """Return the ensemble of saved reward models, packed where `actors.packed_linear` can."""
        members = [RewardModel.load(model, device=device, dtype=dtype) for model in models]
        if pack_weights:
            for member in members:
                pack(member.trunk, is_final=True)
        return cls(members)

    def score(
        self, texts: Sequence[str], *, prompt: Prompt | None, max_tokens: int
    ) -> tuple[list[float], list[float | None]]:
        """Return the members' mean and population standard deviation for each text, None for a single member."""
        scores = np.array([member.score(texts, prompt=prompt, max_tokens=max_tokens) for member in self._members])
        deviations: list[float | None] = [None] * len(texts)
        if len(self._members) > 1:
            deviations = scores.std(axis=0).tolist()
        return scores.mean(axis=0).tolist(), deviations

    def character_attention(self, texts: Sequence[str], *, prompt: Prompt | None, max_tokens: int) -> list[np.ndarray]:
        """Return the members' mean attention on each text's characters, see `RewardModel.character_attention`."""
        found = [member.character_attention(texts, prompt=prompt, max_tokens=max_tokens) for member in self._members]
        return [np.mean(maps, axis=0) for maps in zip(*found, strict=True)]
