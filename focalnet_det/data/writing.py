"""Files that are whole or absent, and many of them in parallel."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

Job = TypeVar("Job")
Result = TypeVar("Result")


def write_atomically(path: Path, parts: Iterable[str]) -> None:
    """Writes text, in parts, to a temporary name beside a path, and renames it."""
    with _renamed_to(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(parts)


def write_picture(path: Path, pixels: NDArray[Any]) -> None:
    """Writes a PNG of bytes, (H, W) or (H, W, 3), in the same way."""
    with _renamed_to(path) as temporary:
        Image.fromarray(pixels.astype(np.uint8)).save(temporary, format="png")


@contextmanager
def _renamed_to(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
