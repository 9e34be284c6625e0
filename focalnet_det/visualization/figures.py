"""Save matplotlib figures."""

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ..atomic import replacing


def save_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Save a figure as a PNG of 110 dpi atomically, and close it.

    Args:
        figure: the figure.
        path: PNG to write.
        options: passed to ``savefig``.
    Raises: OSError if the file cannot be written; the figure is closed nevertheless.
    """
    try:
        with replacing(path, durable=False) as temporary:
            figure.savefig(temporary, dpi=110, format="png", **options)
    finally:
        plt.close(figure)
