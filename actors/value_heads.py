"""Value heads beside a language model: twin Q, their slow target copies, and V; on disk and in memory.

They read the hidden states that the model's output head receives.  The learner trains them (`learner/value_model.py`),
the engine's hook samples with them (`guidance.py`).
"""

import copy
import json
import math
import os
from dataclasses import asdict, dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

_TENSORS = "value_heads.safetensors"
_SETTINGS = "value_heads.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """What is needed to build heads before their weights are loaded."""

    hidden_size: int
    vocab_size: int
    has_v: bool
    """Whether V is a head of its own; without it V is the largest Q."""


class ValueHeads(nn.Module):
    """Q(s, a) for every token a, twice, with target copies that no gradient reaches; and V(s).

    Every head ends in zeros, so all values are 0 before the first update.

    Args:
        shape: of the model that they stand beside.
        seed: of the first layers' weights.
    """

    def __init__(self, shape: HeadShape, *, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        generator = torch.Generator().manual_seed(seed % 2**63)
        self.q = nn.ModuleList(_Head(shape.hidden_size, shape.vocab_size, generator) for _ in range(2))
        self.target_q = copy.deepcopy(self.q).requires_grad_(False)
        self.v = _Head(shape.hidden_size, 1, generator) if shape.has_v else None

    def target(self, hidden: Tensor) -> Tensor:
        """Return the smaller target Q of every token, [B, V] float32, of hidden states [B, H]."""
        first, second = (head(hidden).float() for head in self.target_q)
        return torch.minimum(first, second)

    def advantages(self, hidden: Tensor) -> Tensor:
        """Return min Q(s, a) - V(s) of every token, [B, V] float32."""
        target = self.target(hidden)
        baseline = target.amax(-1, keepdim=True) if self.v is None else self.v(hidden).float()
        return target - baseline

    def save(self, directory: str, *, beta: float) -> None:
        """Write weights and settings beside a model; `beta` is what decoding uses unless it is told otherwise."""
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, os.path.join(directory, _TENSORS))
        with open(os.path.join(directory, _SETTINGS), "w", encoding="utf-8") as file:
            json.dump({**asdict(self.shape), "beta": beta}, file)

    @classmethod
    def load(cls, directory: str) -> tuple["ValueHeads", float]:
        """Return saved heads, on the CPU in eval mode, and the beta they were saved with.

        Raises:
            ValueError: if the directory holds none.
        """
        path = os.path.join(directory, _SETTINGS)
        if not os.path.isfile(path):
            raise ValueError(
                f"value heads must be a directory with {_SETTINGS}, got {os.path.abspath(directory)!r}; "
                "train them by `concord offline` with algorithm ilql or q_learning"
            )
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
        beta = settings.pop("beta")
        heads = cls(HeadShape(**settings))
        tensors = load_file(os.path.join(directory, _TENSORS))
        heads.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
        return heads.eval(), beta


class _Head(nn.Module):
    """Two layers with a rectifier between them; the last one starts at zero."""

    def __init__(self, hidden_size: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, 2 * hidden_size)
        self.outer = nn.Linear(2 * hidden_size, width)
        with torch.no_grad():
            self.inner.weight.normal_(0.0, math.sqrt(1.0 / hidden_size), generator=generator)
            for tensor in (self.inner.bias, self.outer.weight, self.outer.bias):
                tensor.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [B, width]."""
        return self.outer(F.relu(self.inner(hidden)))
