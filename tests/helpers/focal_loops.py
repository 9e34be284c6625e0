"""Focal attention written as loops over windows, queries and tokens, from its description.

Shares nothing with the code under test: nothing is rolled, unfolded, gathered or simplified.
"""

import math

import torch
from torch import Tensor

SHIFTS = ((3, 3), (3, -3), (-3, 3), (-3, -3))


def neighbor_list() -> list[tuple[int, int, int]]:
    """(column, row, column) of the neighbors' table: cells of four shifted copies outside 7x7."""
    found = []
    for dy, dx in SHIFTS:
        for i in range(7):
            for j in range(7):
                if not (0 <= i + dy < 7 and 0 <= j + dx < 7):
                    found.append((len(found), i + dy, j + dx))
    assert len(found) == 132
    return found


def project(module: torch.nn.Module, x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, C) -> queries, keys, values (tokens, heads, d)."""
    out = x @ module.qkv.weight.T + module.qkv.bias
    return tuple(out.reshape(len(x), 3, heads, -1).unbind(1))


def pad(x: Tensor) -> Tensor:
    height, width, channels = x.shape
    padded = x.new_zeros(math.ceil(height / 7) * 7, math.ceil(width / 7) * 7, channels)
    padded = padded.clone()
    padded[:height, :width] = x
    return padded


def pooled_tokens(x: Tensor, pool: torch.nn.Linear) -> Tensor:
    """(Hp, Wp, C) -> (Hp / 7, Wp / 7, C)."""
    rows = []
    for i in range(x.shape[0] // 7):
        row = []
        for j in range(x.shape[1] // 7):
            total = pool.bias[0] * torch.ones_like(x[0, 0])
            for r in range(7):
                for c in range(7):
                    total = total + pool.weight[0, 7 * r + c] * x[7 * i + r, 7 * j + c]
            row.append(total)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def loop_v1(module: torch.nn.Module, x: Tensor, pool: torch.nn.Linear) -> Tensor:
    """(H, W, C) -> (H, W, C), normed tokens in, projected out."""
    height, width, channels = x.shape
    heads, f = module.num_heads, module.focal_window
    x = pad(x)
    hp, wp = x.shape[:2]
    q, k, v = (t.reshape(hp, wp, heads, -1) for t in project(module, x.flatten(0, 1), heads))
    p = pooled_tokens(x, pool)
    _, pk, pv = (
        t.reshape(*p.shape[:2], heads, -1) for t in project(module, p.flatten(0, 1), heads)
    )
    own, to_windows = (
        module.relative_position_bias_table,
        module.relative_position_bias_table_to_windows[0],
    )
    neighbors = module.relative_position_bias_table_to_neighbors
    result = {}
    for y in range(height):
        for x_ in range(width):
            i, j, r, c = y // 7, x_ // 7, y % 7, x_ % 7
            keys, values, biases = [], [], []
            for u in range(7):
                for w in range(7):
                    keys.append(k[7 * i + u, 7 * j + w])
                    values.append(v[7 * i + u, 7 * j + w])
                    biases.append(own[(r - u + 6) * 13 + (c - w + 6)])
            if min(height, width) > 7:
                for column, u, w in neighbor_list():
                    place = (7 * i + u) % hp, (7 * j + w) % wp
                    keys.append(k[place])
                    values.append(v[place])
                    biases.append(neighbors[0, :, 7 * r + c, column])
            for u in range(f):
                for w in range(f):
                    place = i + u - f // 2, j + w - f // 2
                    index = (r - u + f - 1) * (6 + f) + (c - w + f - 1)
                    if 0 <= place[0] < hp // 7 and 0 <= place[1] < wp // 7:
                        keys.append(pk[place])
                        values.append(pv[place])
                        biases.append(to_windows[:, index])
                    else:
                        keys.append(torch.zeros_like(pk[0, 0]))
                        values.append(torch.zeros_like(pv[0, 0]))
                        biases.append(to_windows[:, index] - 100)
            result[y, x_] = one_query(q[y, x_], keys, values, biases)
    out = torch.stack([result[y, x_] for y in range(height) for x_ in range(width)])
    return (out @ module.proj.weight.T + module.proj.bias).reshape(height, width, channels)


def one_query(query: Tensor, keys: list, values: list, biases: list) -> Tensor:
    """(heads, d) -> (C,)."""
    key, value, bias = torch.stack(keys), torch.stack(values), torch.stack(biases)
    logits = (query[None] * key).sum(-1) / math.sqrt(query.shape[-1]) + bias
    weights = logits.exp() / logits.exp().sum(0)
    return (weights[:, :, None] * value).sum(0).flatten()


def closest(y: int, x: int, height: int, width: int, count: int) -> list[tuple[int, int]]:
    """The tokens of a map closest to a point: by squared distance, then row by row."""
    places = [(a, b) for a in range(height) for b in range(width)]
    return sorted(places, key=lambda s: ((s[0] - y) ** 2 + (s[1] - x) ** 2, s))[:count]


def loop_v2(module: torch.nn.Module, x: Tensor, pool: torch.nn.Linear) -> Tensor:
    """As :func:`loop_v1`, for version 2."""
    height, width, channels = x.shape
    heads = module.num_heads
    x = pad(x)
    rows, columns = x.shape[0] // 7, x.shape[1] // 7
    q, k, v = (t.reshape(*x.shape[:2], heads, -1) for t in project(module, x.flatten(0, 1), heads))
    p = pooled_tokens(x, pool)
    _, pk, pv = (
        t.reshape(*p.shape[:2], heads, -1) for t in project(module, p.flatten(0, 1), heads)
    )

    def bias(level: int, dy: int, dx: int) -> Tensor:
        first, _, second = module.coord2rpb_all[level]
        offset = torch.tensor([dy, dx], dtype=x.dtype)
        return second.weight @ (first.weight @ offset + first.bias).clamp(min=0) + second.bias

    out = {}
    for i in range(rows):
        for j in range(columns):
            fine = closest(7 * i + 3, 7 * j + 3, height, width, module.top_k)
            coarse = closest(i, j, rows, columns, module.top_k)
            for r in range(7):
                for c in range(7):
                    y, z = 7 * i + r, 7 * j + c
                    if y >= height or z >= width:
                        continue
                    biases = [bias(0, y - a, z - b) for a, b in fine]
                    biases += [bias(1, 7 * (i - a) + r - 3, 7 * (j - b) + c - 3) for a, b in coarse]
                    keys = [k[s] for s in fine] + [pk[s] for s in coarse]
                    values = [v[s] for s in fine] + [pv[s] for s in coarse]
                    out[y, z] = one_query(q[y, z], keys, values, biases)
    stacked = torch.stack([out[y, z] for y in range(height) for z in range(width)])
    return (stacked @ module.proj.weight.T + module.proj.bias).reshape(height, width, channels)
