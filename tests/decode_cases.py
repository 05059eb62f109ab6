"""Slots and queries of several shapes, and attention in float64, for the kernels that decode."""

import torch

SHAPES = {  # rows, heads, kv heads, head_dim, max_len
    "few rows, long": (2, 4, 2, 64, 400),
    "one head each": (5, 3, 3, 32, 96),
    "many heads share": (3, 20, 1, 16, 144),
    "odd width": (4, 6, 2, 24, 80),
}


def inputs(name, dtype=torch.float32):
    rows, heads, kv_heads, head_dim, max_len = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, heads, head_dim, generator=generator)
    # a slot more than rows, and rubbish where nothing has been stored
    keys, values = (torch.randn(rows + 1, kv_heads, max_len, head_dim, generator=generator) for _ in range(2))
    positions = torch.randint(0, max_len, (rows,), generator=generator)
    positions[0], positions[-1] = 0, max_len - 1
    for row, position in enumerate(positions.tolist()):
        keys[row, :, position + 1 :] = 1e3
        values[row, :, position + 1 :] = torch.nan
    return [one.to(dtype) for one in (query, keys, values)], positions


def reference(query, keys, values, positions, *, scaling, sliding_window=None, softcap=None):
    """Attention row by row and head by head, in float64."""
    shared = query.shape[1] // keys.shape[1]
    output = torch.empty(query.shape, dtype=torch.float64)
    for row, position in enumerate(positions.tolist()):
        first = 0 if sliding_window is None else max(0, position + 1 - sliding_window)
        for head in range(query.shape[1]):
            k = keys[row, head // shared, first : position + 1].cpu().double()
            v = values[row, head // shared, first : position + 1].cpu().double()
            scores = k @ query[row, head].cpu().double() * scaling
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            output[row, head] = torch.softmax(scores, 0) @ v
    return output
