"""Draw the tokens that a query of each family attends to, from the backbones' index tables."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..atomic import replacing
from ..ops.cyclic import cyclic_keys
from ..ops.nearest import nearest_sets
from ..ops.window_attention import WindowGrid

NOTHING, NEIGHBOR, OWN = 0, 1, 2


def cyclic_view(
    size: WindowGrid, window: int, expand: int = 3, focal_window: int = 7
) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that a window of Focal Transformer, version 1, attends to.

    Args:
        size: size of the feature map, a multiple of the window.
        window: index of the window, in row-major order.
        expand, focal_window: parameters of the stage.
    Returns: (H, W) of NOTHING, NEIGHBOR or OWN, and (rows, columns), True for windows whose pooled
        token is attended to.
    """
    keys = cyclic_keys(size, expand, focal_window, torch.device("cpu"))
    assert keys.order is not None
    assert keys.inside is not None
    row = int((keys.order == window).nonzero())
    return _view(size, keys.tokens[row][keys.inside[row]], window)


def nearest_view(size: WindowGrid, window: int, top_k: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that a window of version 2 attends to; see :func:`cyclic_view`."""
    tokens, windows = (numbers[window] for numbers in nearest_sets(size, top_k))
    y, x = tokens // size.width, tokens % size.width
    fine, pooled = np.zeros((size.height, size.width), int), np.zeros((size.rows, size.columns))
    fine[y, x] = NEIGHBOR
    pooled.flat[windows.numpy()] = 1
    top, left = (n * size.window for n in divmod(window, size.columns))
    own = fine[top : top + size.window, left : left + size.window]
    own[own == NEIGHBOR] = OWN
    return fine, pooled > 0


def _view(size: WindowGrid, tokens: torch.Tensor, window: int) -> tuple[np.ndarray, np.ndarray]:
    cells = size.windows * size.cells
    number = tokens[tokens < cells].numpy()
    holder, cell = number // size.cells, number % size.cells
    fine, pooled = np.zeros((size.height, size.width), int), np.zeros((size.rows, size.columns))
    y = holder // size.columns * size.window + cell // size.window
    x = holder % size.columns * size.window + cell % size.window
    fine[y, x] = np.where(holder == window, OWN, NEIGHBOR)
    pooled.flat[tokens[tokens >= cells].numpy() - cells] = 1
    return fine, pooled > 0


def modulation_view(size: WindowGrid, kernels: tuple[int, ...]) -> np.ndarray:
    """Count the focal levels whose receptive field covers each token from the center, (H, W).

    Receptive fields add up, since each level convolves the output of the previous one.

    Args:
        size: size of the feature map.
        kernels: kernel size of each level.
    """
    distance_y, distance_x = (
        abs(np.arange(side) - side // 2) for side in (size.height, size.width)
    )
    distance = np.maximum(distance_y[:, None], distance_x)
    reaches = np.cumsum([kernel // 2 for kernel in kernels])
    return (distance[..., None] <= reaches).sum(-1)


def draw_families(path: str | Path, side: int = 56) -> None:
    """Draw the tokens that one query of each family attends to, as a PNG.

    Args:
        path: PNG to write.
        side: side of the square feature map, tokens, a multiple of 7.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = WindowGrid(side, side, 7)
    center = size.columns * (size.rows // 2) + size.columns // 2
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 4.4), layout="constrained")
    _draw_attention(axes[0], "Focal Transformer (v1)", cyclic_view(size, center))
    _draw_attention(axes[1], "v1 at the corner: cyclic", cyclic_view(size, 0))
    _draw_attention(axes[2], "Focal-fast (v2): 128 closest", nearest_view(size, center))
    axes[3].imshow(
        modulation_view(size, (3, 5, 7)), cmap="Blues", vmax=4, extent=(0, side, side, 0)
    )
    axes[3].set_title("FocalNet: three levels and the global mean")
    for axis in axes:
        axis.set_xticks(range(0, side + 1, 7))
        axis.set_yticks(range(0, side + 1, 7))
        axis.grid(color="#cccccc", linewidth=0.5)
        axis.tick_params(labelsize=6)
    figure.supxlabel(
        "Tokens; grid lines are windows of 7 x 7. Dark: window of the query; light: other tokens "
        "attended to individually; orange: windows attended to as one pooled token.",
        fontsize=9,
    )
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)


def _draw_attention(axis: Any, title: str, view: tuple[np.ndarray, np.ndarray]) -> None:
    from matplotlib.colors import ListedColormap

    tokens, pooled = view
    height, width = tokens.shape
    colors = ListedColormap(["white", "#9ecae1", "#3182bd"])
    axis.imshow(tokens, cmap=colors, vmin=0, vmax=2, extent=(0, width, height, 0))
    for row, column in zip(*pooled.nonzero(), strict=True):
        axis.plot(column * 7 + 3.5, row * 7 + 3.5, "s", color="#fd8d3c", markersize=4)
    axis.set_title(title)
