"""Linear layers that keep their weight a second time, in the order in which oneDNN's products read it fastest.

A product of few rows with a large matrix, which is what decoding a token is, spends much of its time bringing the
matrix into that order.  Weights that stay for many products are brought into it once.  On SmolLM2-135M with 32 rows
the layers take a little more than half the time (`benchmarks/engine.py`), for as much memory again as the weights have
where those still change.  Layers that take the same input, such as those of query, key and value, become one product.

float32 on a CPU only.  A layer is packed if, on this very processor, a row has the same bits in every company then,
which is what the torch engine and the judges promise; that is tried out once for each shape.
"""

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

_PROBE_SEED = 20240317
_PROBE_ROWS = (4, 7, 12, 32, 61, 128, 256)
_PIECE_BYTES = 2**27  # so that the head of a small model is one product, without a copy of all its logits
_TOLERANCE = 1e-4  # of the largest value: two orders of summing differ by less, a wrong product by far more

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""What transformers calls layers of one module that take the same input."""


class PackedLinear(nn.Linear):
    """A linear layer without gradient, a part of a packed product; `weight` is what was packed."""

    product: "PackedProduct"
    part: int

    def forward(self, input: Tensor) -> Tensor:
        """Return `input @ weight.T + bias`, [..., out]."""
        return self.product.take(self.part, input)


class PackedProduct:
    """The product of an input with one layer, or with several that take the same input, one after another.

    The first of several, which models ask for first, computes all of them anew, each time.  Nothing rests on the guess
    that they take the same input: another one is computed for whoever brings it.
    """

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        self._layers = layers
        self._sizes = [layer.out_features for layer in layers]
        self._waiting: tuple[Tensor, dict[int, Tensor]] | None = None  # an input, and its results that others will take
        self.packed: list[Tensor] = []
        """Of some rows of the weights each, one after another."""
        self._bias: Tensor | None = None
        self.repack()

    def take(self, part: int, input: Tensor) -> Tensor:
        """Return the result of layer `part`."""
        if len(self._sizes) == 1:
            return _product(input, self.packed, self._bias)
        waiting = self._waiting  # once, as threads may share a judge
        if part > 0 and waiting is not None and waiting[0] is input and part in waiting[1]:
            result = waiting[1].pop(part)
            if not waiting[1]:
                self._waiting = None
            return result
        results = dict(enumerate(_product(input, self.packed, self._bias).split(self._sizes, dim=-1)))
        result = results.pop(part)
        if part == 0:
            self._waiting = (input, results)
        return result

    def repack(self) -> None:
        """Pack the weights as they are now, in place where there is a place."""
        weight, self._bias = _together(self._layers)
        if not self.packed:
            self.packed = _pack(weight)
            return
        for target, rows in zip(self.packed, _pieces(weight), strict=True):
            # From the order that it is to have: from a plain one the target would take over that.
            target.copy_(_reordered(rows))


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
    for layers in _candidates(model):
        shape = torch.Size((sum(layer.out_features for layer in layers), layers[0].in_features))
        if shape not in keeps_bits:
            keeps_bits[shape] = _keeps_bits(_together(layers)[0])
            if not keeps_bits[shape]:
                logger.info("products with a %s matrix depend on their company when packed: not packed", tuple(shape))
        if keeps_bits[shape]:
            _take_over(layers)
            if is_final:
                for layer in layers:
                    nothing = torch.full((), torch.nan).expand(layer.weight.shape)
                    layer.weight = nn.Parameter(nothing, requires_grad=False)
            count += len(layers)
    if not is_final:
        repack(model)  # the first time takes memory that later ones have again: now, not beside an update's buckets
    return count


def repack(model: nn.Module) -> None:
    """Pack all packed layers again, after their weights have changed."""
    for product in _products(model):
        product.repack()


def release(model: nn.Module) -> None:
    """Give all packed copies back; packing again takes memory for them anew."""
    for product in _products(model):
        product.packed = []


def _products(model: nn.Module) -> Iterator[PackedProduct]:
    layers = (layer for layer in model.modules() if isinstance(layer, PackedLinear))
    return (layer.product for layer in layers if layer.part == 0)


def _candidates(model: nn.Module) -> Iterator[list[nn.Linear]]:
    """Yield layers that take the same input, and then each one that has not been packed with its siblings."""
    for module in model.modules():
        for names in _SIBLINGS:
            layers = [getattr(module, name, None) for name in names]
            family = [layer for layer in layers if isinstance(layer, nn.Linear) and _can_be_packed(layer)]
            if len(family) == len(names) and _fit_together(family):
                yield family
    for module in model.modules():
        if isinstance(module, nn.Linear) and _can_be_packed(module):
            yield [module]


def _can_be_packed(layer: nn.Linear) -> bool:
    return type(layer) is nn.Linear and layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32


def _fit_together(layers: Sequence[nn.Linear]) -> bool:
    """Return whether one product takes their inputs and biases, and is not so large that it comes in pieces anyway."""
    kinds = {(layer.in_features, layer.bias is None) for layer in layers}
    return len(kinds) == 1 and sum(layer.weight.nbytes for layer in layers) <= _PIECE_BYTES


def _together(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Return the weights of layers and their biases, [outs, in] and [outs]."""
    if len(layers) == 1:
        return layers[0].weight.detach(), layers[0].bias
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    return torch.cat([layer.weight.detach() for layer in layers]), torch.cat(biases) if biases else None


def _take_over(layers: Sequence[nn.Linear]) -> None:
    parts: list[PackedLinear] = []
    for index, layer in enumerate(layers):
        layer.__class__ = PackedLinear
        assert isinstance(layer, PackedLinear), "the class has just been set"
        layer.part = index
        parts.append(layer)
    product = PackedProduct(parts)
    for part in parts:
        part.product = product


def _pieces(weight: Tensor) -> Sequence[Tensor]:
    """Return the weight in pieces, so that packing it again takes little memory beside it."""
    rows = max(1, _PIECE_BYTES // (weight.shape[1] * weight.element_size()))
    return weight.split(rows)


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
