"""Write images atomically, and process many files in parallel."""

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


def write_png(path: Path, pixels: NDArray[Any]) -> None:
    """Write a PNG atomically.

    Args:
        path: file to write or replace.
        pixels: (H, W) or (H, W, 3), 0..255.
    """
    with replacing(path, durable=False) as temporary:
        Image.fromarray(pixels.astype(np.uint8)).save(temporary, format="png")


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int
) -> Iterator[Result]:
    """Yield the results of a function in the order of its jobs, with a progress bar.

    Args:
        function: picklable, so defined at the top level of a module.
        jobs: arguments.
        workers: number of processes; 1 runs in the current process.
    """

    def results() -> Iterator[Result]:
        if workers <= 1 or len(jobs) <= 1:
            yield from map(function, jobs)
            return
        with get_context("spawn").Pool(workers) as pool:
            yield from pool.imap(function, jobs, chunksize=32)

    yield from tqdm(results(), total=len(jobs), disable=not jobs)
