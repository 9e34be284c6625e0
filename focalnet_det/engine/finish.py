"""The end of a run: what it leaves besides weights, each thing on its own."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..atomic import write_text
from .run_folder import EVALUATION, RunFolder, in_first_process

logger = logging.getLogger("focalnet_det")

RESULTS = f"{EVALUATION}/results.json"


@dataclass(frozen=True, kw_only=True)
class Product:
    """A file that a finished run leaves.

    Attributes:
        name: of the file, in the run's folder.
        make: write it; returns whether there is anything to write.
        required: the run has failed without it.
    """

    name: str
    make: Callable[[], bool]
    required: bool = False


def finish(
    folder: RunFolder,
    iterations: int,
    products: Sequence[Product],
    *,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Make the products that a finished run lacks. To be called in all processes.

    Required ones come first. An optional one that fails costs a warning, and ``--resume`` on the
    finished run tries again.

    Args:
        iterations: that were done; products of a shorter training are made anew.
        between: called before each product; what it raises ends the rest.
    Raises: the first error of a required product, when all others have been tried.
    """

    def make_all() -> None:
        failure: Exception | None = None
        for product in sorted(products, key=lambda p: not p.required):
            between()
            if folder.has_product(product.name, iterations):
                continue
            try:
                if product.make():
                    folder.note_product(product.name, iterations)
            except Exception as error:
                if product.required:
                    failure = failure or error
                    continue
                logger.warning(
                    "%s could not be made (%s: %s). The run is complete without it; --resume tries "
                    "again.",
                    folder.path / product.name,
                    type(error).__name__,
                    error,
                )
                logger.debug("What kept it from being made:", exc_info=error)
        if failure is not None:
            raise failure

    in_first_process(make_all)


def write_results(folder: Path, iteration: int, results: Mapping[str, Any]) -> None:
    """Keep the results of an evaluation, so that a finished run need not repeat it."""
    text = json.dumps({"iteration": iteration, "results": results}, default=float)
    write_text(folder / RESULTS, text)


def read_results(folder: Path, iteration: int) -> dict[str, Any] | None:
    """Read the results of the evaluation after an iteration; None if there are none."""
    try:
        content = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return dict(content["results"]) if content.get("iteration") == iteration else None
