"""Compute which tokens a window of focal attention reads: geometry only, no features."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .focal_block.policy import assume_constant

Shift = tuple[int, int]


def offset_index(window: int, other: int, shift: int, device: torch.device) -> Tensor:
    """Return the rows of a bias table that belong to the offsets between cells of two squares.

    Args:
        window, other: sides of the squares of query and key cells, tokens.
        shift: added to the offsets, so that the smallest is 0.
        device: device of the result.
    Returns: (``window^2``, ``other^2``), int64.
    """
    query, key = (torch.arange(side, device=device) for side in (window, other))
    difference = query[:, None] - key + shift  # (window, other)
    span = window + other - 1
    index = difference[:, None, :, None] * span + difference[None, :, None, :]
    return index.reshape(window * window, other * other)


@functools.cache
def neighbor_cells(window: int, expand: int) -> tuple[tuple[Shift, tuple[int, ...]], ...]:
    """Return the columns of the neighbor bias table: the cells read from each shifted map.

    A map shifted by (dy, dx) has at cell (r, c) the token at (r + dy, c + dx); it is read where
    that lies outside the window. Shifts and cells are in the order of the table.

    Args:
        window: side of a window, tokens.
        expand: width of the ring of neighbors, tokens.
    Returns: ((dy, dx), row-major indices of cells) for each shifted map.
    """
    inside = range(window)
    return tuple(
        (
            (dy, dx),
            tuple(
                r * window + c
                for r in inside
                for c in inside
                if r + dy not in inside or c + dx not in inside
            ),
        )
        for dy in (expand, -expand)
        for dx in (expand, -expand)
    )


def neighbor_columns(window: int, expand: int) -> int:
    """Return the number of columns of the neighbor bias table."""
    return sum(len(cells) for _, cells in neighbor_cells(window, expand)) if expand else 0


class Ring(NamedTuple):
    """The tokens around a window, each once; those in two of the shifted maps come last.

    Attributes:
        offsets: (row, column) of each token relative to the window's first cell.
        columns: column of each token in the neighbor bias table.
        second: second column of the tokens that are in two shifted maps.
    """

    offsets: tuple[Shift, ...]
    columns: tuple[int, ...]
    second: tuple[int, ...]


@assume_constant
def ring(window: int, expand: int) -> Ring:
    """Return the tokens up to ``expand`` cells around a window of side ``window``."""
    return _ring(window, expand)


@functools.cache
def _ring(window: int, expand: int) -> Ring:
    columns_of: dict[Shift, list[int]] = {}
    column = 0
    for (dy, dx), cells in neighbor_cells(window, expand):
        for cell in cells:
            offset = (cell // window + dy, cell % window + dx)
            columns_of.setdefault(offset, []).append(column)
            column += 1
    ordered = sorted(columns_of.items(), key=lambda item: (len(item[1]), item[0]))
    return Ring(
        offsets=tuple(offset for offset, _ in ordered),
        columns=tuple(columns[0] for _, columns in ordered),
        second=tuple(columns[1] for _, columns in ordered if len(columns) == 2),
    )
