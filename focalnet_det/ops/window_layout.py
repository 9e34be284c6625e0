"""Which tokens a window of focal attention reads: geometry alone, no features."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import constant

Shift = tuple[int, int]


def offset_index(window: int, other: int, shift: int, device: torch.device) -> Tensor:
    """Rows of a bias table by the offset between cells of two squares.

    Args:
        window, other: sides of the squares of query and key cells.
        shift: added to the offsets, so that the least one is 0.
    Returns: (``window^2``, ``other^2``), int64.
    """
    query, key = (torch.arange(side, device=device) for side in (window, other))
    difference = query[:, None] - key + shift  # (window, other)
    span = window + other - 1
    index = difference[:, None, :, None] * span + difference[None, :, None, :]
    return index.reshape(window * window, other * other)


@functools.cache
def neighbor_cells(window: int, expand: int) -> tuple[tuple[Shift, tuple[int, ...]], ...]:
    """Columns of the table of neighbors: of each shifted copy of the map, the cells that are read.

    A copy displaced by (dy, dx) has at cell (r, c) the token at (r + dy, c + dx); it is read where
    that lies outside the window. Copies and cells are in the order of the table.

    Returns: ((dy, dx), numbers of cells) of each copy.
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
    """Number of columns of the table of neighbors."""
    return sum(len(cells) for _, cells in neighbor_cells(window, expand)) if expand else 0


class Ring(NamedTuple):
    """Tokens around a window, each once. Those in two of the shifted copies come last.

    Attributes:
        offsets: (row, column) of each from the window's first cell.
        columns: of each in the table of neighbors.
        second: the other column of those in two copies.
    """

    offsets: tuple[Shift, ...]
    columns: tuple[int, ...]
    second: tuple[int, ...]


@constant
def ring(window: int, expand: int) -> Ring:
    """The tokens up to ``expand`` cells around a window."""
    return _ring(window, expand)


@functools.cache
def _ring(window: int, expand: int) -> Ring:
    places: dict[Shift, list[int]] = {}
    column = 0
    for (dy, dx), cells in neighbor_cells(window, expand):
        for cell in cells:
            place = (cell // window + dy, cell % window + dx)
            places.setdefault(place, []).append(column)
            column += 1
    ordered = sorted(places.items(), key=lambda item: (len(item[1]), item[0]))
    return Ring(
        offsets=tuple(place for place, _ in ordered),
        columns=tuple(columns[0] for _, columns in ordered),
        second=tuple(columns[1] for _, columns in ordered if len(columns) == 2),
    )
