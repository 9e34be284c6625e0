"""Generate the dataset `shapes`: overlapping textured shapes on textured backgrounds.

Equal parameters give equal bytes, regardless of the number of workers, because each image has its
own random stream.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from focalnet_det.data.shapes.export import (
    SPLITS,
    Record,
    Split,
    categories,
    json_files,
    output_folders,
    write_sample,
)
from focalnet_det.data.shapes.scene import (
    STUFF_CLASSES,
    THING_CLASSES,
    apply_camera_effects,
    draw_scene,
)

__all__ = ["STUFF_CLASSES", "THING_CLASSES", "default_root", "make_shapes", "parse_size"]

logger = logging.getLogger(__name__)

# Increase it whenever a change alters the output for equal parameters.
VERSION = 3
MIN_SIDE, MAX_SIDE = 64, 4096
MARKER = "dataset.json"


def default_root() -> Path:
    """Return `$DETECTRON2_DATASETS/shapes`, or `datasets/shapes` if the variable is not set."""
    return Path(os.environ.get("DETECTRON2_DATASETS") or "datasets") / "shapes"


def parse_size(text: str) -> tuple[int, int]:
    """Parse `192` or `256x192` (width x height) to (width, height) in pixels.

    Raises: ValueError if it is neither.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"Size {text!r} is neither a number nor WIDTHxHEIGHT, such as 256x192.")
    return int(parts[0]), int(parts[-1])


def _draw_one(root: Path, size: tuple[int, int], seed: int, job: tuple[Split, int]) -> Record:
    split, index = job
    rng = np.random.default_rng((seed, split.index, index))
    scene = draw_scene(rng, *size)
    return write_sample(root, split, index, scene, apply_camera_effects(rng, scene), rng)


@contextmanager
def _one_opencv_thread() -> Iterator[None]:
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


def _draw_split(
    root: Path, split: Split, count: int, size: tuple[int, int], seed: int, workers: int
) -> list[Record]:
    jobs = [(split, index) for index in range(count)]
    draw = partial(_draw_one, root, size, seed)
    if workers == 1:
        with _one_opencv_thread():
            return [draw(job) for job in jobs]
    # Forked workers need not import anything; platforms without fork use the default.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else None)
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=cv2.setNumThreads, initargs=(1,)
    ) as pool:
        return list(pool.map(draw, jobs, chunksize=8))


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


def _build(
    root: Path, counts: dict[str, int], size: tuple[int, int], seed: int, workers: int
) -> None:
    (root / "annotations").mkdir(parents=True)
    info = {"description": "Generated data set: shapes", "version": str(VERSION)}
    for split in SPLITS:
        for folder in output_folders(root, split.name).values():
            folder.mkdir(parents=True)
        records = _draw_split(root, split, counts[split.name], size, seed, workers)
        for name, content in json_files(split, records, info).items():
            _write_json(root / "annotations" / name, content)
    text = json.dumps(categories(), indent=2)
    (root / "categories.json").write_text(text + "\n", encoding="utf-8")


def _is_current(root: Path, parameters: Record, force: bool) -> bool:
    """Return whether `root` contains the dataset with these parameters.

    Raises: FileExistsError if it contains anything else, unless `force` allows replacing it.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    marker = root / MARKER
    if not marker.is_file():
        raise FileExistsError(
            f"{root} exists and is not a generated dataset. Choose another --out."
        )
    existing = json.loads(marker.read_text(encoding="utf-8"))
    if existing == parameters:
        return not force
    if not force:
        changed = [key for key in parameters if existing.get(key) != parameters[key]]
        raise FileExistsError(
            f"{root} was generated with different values of {', '.join(changed)}. Use --force to "
            "replace it, or choose another --out."
        )
    return False


def _check(train: int, val: int, size: tuple[int, int], seed: int, workers: int) -> None:
    if min(train, val) < 1:
        raise ValueError(f"Each split needs at least one image, got train={train}, val={val}.")
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in size):
        raise ValueError(f"Sides must be {MIN_SIDE} to {MAX_SIDE} pixels, got {size[0]}x{size[1]}.")
    if seed < 0 or workers < 1:
        raise ValueError(f"seed must be >= 0 and workers >= 1, got {seed} and {workers}.")


def make_shapes(
    root: Path,
    *,
    train: int,
    val: int,
    size: tuple[int, int],
    seed: int,
    workers: int,
    force: bool = False,
) -> Path:
    """Generate the dataset in `root`, unless it already exists with the same parameters.

    Args:
        root: output folder.
        train, val: number of images of each split.
        size: (width, height) in pixels.
        seed: of all random numbers.
        workers: number of processes.
        force: replace an existing generated dataset.
    Returns: `root`.
    Raises: ValueError on parameters out of range; FileExistsError if `root` contains other data.
    """
    _check(train, val, size, seed, workers)
    counts = {"train": train, "val": val}
    parameters: Record = {"name": "shapes", "version": VERSION, "seed": seed, **counts}
    parameters.update(width=size[0], height=size[1])
    root = Path(root)
    if _is_current(root, parameters, force):
        logger.info("%s already exists with the same parameters.", root)
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as scratch:
        fresh, old = Path(scratch) / "new", Path(scratch) / "old"
        _build(fresh, counts, size, seed, workers)
        _write_json(fresh / MARKER, parameters)
        if root.exists():
            root.rename(old)
        fresh.rename(root)
    logger.info("Generated %s: %d train and %d val images.", root, train, val)
    return root
