"""Pictures that are whole or absent, and many of them in parallel."""

from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ...atomic import replacing

Job = TypeVar("Job")
Result = TypeVar("Result")


def write_picture(path: Path, pixels: NDArray[Any]) -> None:
    """Write a PNG of bytes, (H, W) or (H, W, 3), whole or not at all."""
    with replacing(path, durable=False) as temporary:
        Image.fromarray(pixels.astype(np.uint8)).save(temporary, format="png")


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int
) -> Iterator[Result]:
    """Results of a function of a module, in order, with a progress bar.

    Args:
        workers: processes; 1 for this one.
    """

    def results() -> Iterator[Result]:
        if workers <= 1 or len(jobs) <= 1:
            yield from map(function, jobs)
            return
        with get_context("spawn").Pool(workers) as pool:
            yield from pool.imap(function, jobs, chunksize=32)

    yield from tqdm(results(), total=len(jobs), disable=not jobs)
