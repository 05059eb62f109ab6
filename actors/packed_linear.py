"""Linear layers that keep their weight a second time, in the order in which oneDNN's products read it fastest.

A product of few rows with a large matrix, which is what decoding a token is, spends much of its time bringing the
matrix into that order.  Weights that stay for many products are brought into it once.  On SmolLM2-135M with 32 rows
the layers take a little more than half the time (`benchmarks/engine.py`), for as much memory again as the weights have
where those still change.

float32 on a CPU only.  A layer is packed if, on this very processor, a row has the same bits in every company then,
which is what the torch engine and the judges promise; that is tried out once for each shape.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

_PROBE_SEED = 20240317
_PROBE_ROWS = (4, 7, 12, 32, 61, 128, 256)
_PIECE_BYTES = 2**24
_TOLERANCE = 1e-4  # of the largest value: two orders of summing differ by less, a wrong product by far more


class PackedLinear(nn.Linear):
    """A linear layer without gradient whose products read the packed copy; `weight` is what was packed."""

    packed: list[Tensor]
    """Of some rows of the weight each, one after another."""

    def repack(self) -> None:
        """Pack the weight as it is now, in place where there is a place."""
        if not self.packed:
            self.packed = _pack(self.weight)
            return
        for target, rows in zip(self.packed, _pieces(self.weight), strict=True):
            # From the order that it is to have: from a plain one the target would take over that.
            target.copy_(_reordered(rows))

    def forward(self, input: Tensor) -> Tensor:
        """Return `input @ weight.T + bias`, [..., out]."""
        return _product(input, self.packed, self.bias)


def pack(model: nn.Module, *, is_final: bool = False) -> int:
    """Pack the plain linear layers of a model, in place; return how many.

    Layers that another class has taken over, such as `actors.scorer.ScoringLinear`, stay as they are.

    Args:
        model: its layers are changed.
        is_final: weights will not change again, so what was packed is given back; its numbers read as NaN from then on.
    """
    if not torch.backends.mkldnn.is_available():
        return 0
    keeps_bits: dict[torch.Size, bool] = {}
    count = 0
    for layer in model.modules():
        if type(layer) is not nn.Linear or layer.weight.device.type != "cpu" or layer.weight.dtype != torch.float32:
            continue
        shape = layer.weight.shape
        if shape not in keeps_bits:
            keeps_bits[shape] = _keeps_bits(layer.weight)
            if not keeps_bits[shape]:
                logger.info("products with a %s matrix depend on their company when packed: not packed", tuple(shape))
        if keeps_bits[shape]:
            layer.__class__ = PackedLinear
            layer.packed = _pack(layer.weight)  # type: ignore[assignment]
            if is_final:
                nothing = torch.full((), torch.nan).expand(shape)
                layer.weight = nn.Parameter(nothing, requires_grad=False)
            count += 1
    if not is_final:
        repack(model)  # the first time takes memory that later ones have again: now, not beside an update's buckets
    return count


def repack(model: nn.Module) -> None:
    """Pack all packed layers again, after their weights have changed."""
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            layer.repack()


def release(model: nn.Module) -> None:
    """Give all packed copies back; packing again takes memory for them anew."""
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            layer.packed = []


def _pieces(weight: Tensor) -> Sequence[Tensor]:
    """Return the weight in pieces, so that packing it again takes little memory beside it."""
    rows = max(1, _PIECE_BYTES // (weight.shape[1] * weight.element_size()))
    return weight.detach().split(rows)


def _pack(weight: Tensor) -> list[Tensor]:
    return [_reordered(rows) for rows in _pieces(weight)]


def _reordered(rows: Tensor) -> Tensor:
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(rows, None)
    return reordered


def _product(input: Tensor, packed: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    if len(packed) == 1:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(input, packed[0], bias, "none", [], "")
        return result
    results = [torch.ops.mkldnn._linear_pointwise(input, piece, None, "none", [], "") for piece in packed]
    together = torch.cat(results, dim=-1)
    return together if bias is None else together.add_(bias)


@torch.no_grad()
def _keeps_bits(weight: Tensor) -> bool:
    """Return whether packed products are right, and a row's bits the same whatever stands around it."""
    packed = _pack(weight)
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    rows = torch.randn(_PROBE_ROWS[-1], weight.shape[1], generator=generator)
    first = rows[: _PROBE_ROWS[0]]
    expected, found = F.linear(first, weight), _product(first, packed, None)
    if (found - expected).abs().max() > _TOLERANCE * expected.abs().max():
        return False
    for count in _PROBE_ROWS[1:]:
        together = _product(rows[:count], packed, None)
        backwards = _product(rows[:count].flip(0).contiguous(), packed, None).flip(0)
        if not (torch.equal(together[: len(first)], found) and torch.equal(together, backwards)):
            return False
    return True
