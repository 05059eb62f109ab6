"""The size of a decoder by arithmetic: parameters, keys and values, activations.

    parameters = V h  +  positions h  +  L (matrices + biases + norms)  +  final norm  +  (0 if tied else V h)

with vocabulary V, width h and L layers.  A layer's matrices, for n heads and k key-value heads of width d and an MLP of
width f: h (n d) + 2 h (k d) + (n d) h, and 3 h f with a gate or 2 h f without.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A linear layer."""

    inputs: int
    outputs: int
    has_bias: bool

    @property
    def num_parameters(self) -> int:
        """Return weights and biases."""
        return self.inputs * self.outputs + (self.outputs if self.has_bias else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    positions: int | None
    """Longest prompt with response, tokens; None = no limit."""
    linears: tuple[Linear, ...]
    """Of one layer."""
    norm_parameters: int
    """Of one layer."""
    other_parameters: int
    """The final norm, and embeddings of positions."""
    is_tied: bool
    """Whether the output head is the embedding."""
    is_gated: bool
    """Whether the MLP has a gate, and norms are without mean (llama and its kin), or neither (gpt2)."""

    @property
    def layer_parameters(self) -> int:
        """Return a layer's parameters."""
        return sum(linear.num_parameters for linear in self.linears) + self.norm_parameters

    @property
    def trunk_parameters(self) -> int:
        """Return the parameters without an output head of its own."""
        return self.vocab * self.hidden + self.other_parameters + self.layers * self.layer_parameters

    @property
    def num_parameters(self) -> int:
        """Return all parameters, tied ones once."""
        return self.trunk_parameters + (0 if self.is_tied else self.vocab * self.hidden)

    @property
    def largest_module(self) -> int:
        """Return the parameters of the largest single module, which ZeRO-3 gathers whole."""
        return max(self.vocab * self.hidden, *(linear.num_parameters for linear in self.linears))

    def lora_parameters(self, rank: int) -> int:
        """Return the parameters of adapters on all linear layers but the output head."""
        return self.layers * sum(rank * (linear.inputs + linear.outputs) for linear in self.linears)

    def kv_bytes(self, *, rows: int, tokens: int, item_bytes: int) -> int:
        """Return the bytes of keys and values of so many samples of so many tokens."""
        return 2 * self.layers * self.kv_heads * self.head_dim * rows * tokens * item_bytes

    def activation_bytes(self, *, tokens: int, item_bytes: int, has_checkpoints: bool) -> int:
        """Return what the graph of one forward pass over so many tokens holds for the backward pass.

        With checkpoints: each layer's input, and one layer's graph while it is run again.
        """
        layer = self._layer_activations(item_bytes) * tokens
        if has_checkpoints:
            return self.layers * self.hidden * item_bytes * tokens + layer
        return self.layers * layer

    def _layer_activations(self, item_bytes: int) -> int:
        """Return the bytes that a layer's graph holds for each token.

        With a gate (h = width, q = heads x width, f = MLP): two norms, each the input in float32, the normalised input
        and the output; queries, keys and values repeated to as many heads, the attention's output twice; gate, up, the
        activated gate and the product.  Without: two norms' inputs and outputs, queries, keys and values, the output
        twice; and of gelu written out, five tensors of the MLP's width.
        """
        queries = self.heads * self.head_dim
        if self.is_gated:
            norm = self.hidden * (4 + 2 * item_bytes)
            return 2 * norm + item_bytes * (5 * queries + 4 * self.intermediate)
        return item_bytes * (9 * self.hidden + 5 * self.intermediate)
