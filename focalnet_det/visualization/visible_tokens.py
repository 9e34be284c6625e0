"""Which tokens a query of each family sees, drawn from the tables that the backbones run on."""

from pathlib import Path

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
    """What a window of Focal Transformer, version 1, reads.

    Args:
        size: of the map; its sides are multiples of the window.
        window: its number, row by row.
        expand, focal_window: of the stage.
    Returns: (H, W) of NOTHING, NEIGHBOR or OWN, and (rows, columns), True where the pooled token
        of a window is read.
    """
    keys = cyclic_keys(size, expand, focal_window, torch.device("cpu"))
    assert keys.order is not None
    assert keys.inside is not None
    row = int((keys.order == window).nonzero())
    return _view(size, keys.tokens[row][keys.inside[row]], window)


def nearest_view(size: WindowGrid, window: int, top_k: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """What a window of version 2 reads; as :func:`cyclic_view`."""
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
    """How many levels of a FocalNet with these kernels reach each token from the middle, (H, W).

    A level reads the one before it, so that their reaches add up.
    """
    distance_y, distance_x = (
        abs(np.arange(side) - side // 2) for side in (size.height, size.width)
    )
    distance = np.maximum(distance_y[:, None], distance_x)
    reaches = np.cumsum([kernel // 2 for kernel in kernels])
    return (distance[..., None] <= reaches).sum(-1)


def draw_families(path: str | Path, side: int = 56) -> None:
    """Draw what one query sees in both families, on a square map, to an image file.

    Args:
        side: of the map, tokens, a multiple of 7.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap

    size = WindowGrid(side, side, 7)
    middle = size.columns * (size.rows // 2) + size.columns // 2
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 4.4), layout="constrained")
    colors = ListedColormap(["white", "#9ecae1", "#3182bd"])
    for axis, (title, view) in zip(
        axes,
        (
            ("Focal Transformer (v1)", cyclic_view(size, middle)),
            ("v1 at the corner: cyclic", cyclic_view(size, 0)),
            ("Focal-fast (v2): 128 closest", nearest_view(size, middle)),
        ),
        strict=False,
    ):
        axis.imshow(view[0], cmap=colors, vmin=0, vmax=2, extent=(0, side, side, 0))
        for row, column in zip(*view[1].nonzero(), strict=True):
            axis.plot(column * 7 + 3.5, row * 7 + 3.5, "s", color="#fd8d3c", markersize=4)
        axis.set_title(title)
    axes[3].imshow(
        modulation_view(size, (3, 5, 7)), cmap="Blues", vmax=4, extent=(0, side, side, 0)
    )
    axes[3].set_title("FocalNet: three levels, and the mean of all")
    for axis in axes:
        axis.set_xticks(range(0, side + 1, 7))
        axis.set_yticks(range(0, side + 1, 7))
        axis.grid(color="#cccccc", linewidth=0.5)
        axis.tick_params(labelsize=6)
    figure.supxlabel(
        "tokens; lines bound windows of 7 x 7. Dark: the query's own window; light: other tokens "
        "read one by one; orange: windows read as one pooled token.",
        fontsize=9,
    )
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)
