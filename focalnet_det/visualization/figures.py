"""Figures as files."""

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ..atomic import replacing


def save_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure as a PNG of 110 dots per inch, whole or not at all, and close it.

    Args:
        options: of ``savefig``.
    Raises: OSError if the file cannot be written; the figure is closed all the same.
    """
    try:
        with replacing(path, durable=False) as temporary:
            figure.savefig(temporary, dpi=110, format="png", **options)
    finally:
        plt.close(figure)
