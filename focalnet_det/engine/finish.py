"""Create the final outputs of a run besides the weights, each independently of the others."""

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
    """Final output file of a run.

    Attributes:
        name: path relative to the output folder.
        make: writes the file; returns whether there was anything to write.
        required: whether the run fails without it.
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
    """Create the products that a finished run lacks. Collective: call it in all processes.

    Required ones are created first. A failure of an optional one only causes a warning, and
    ``--resume`` on the finished run retries it.

    Args:
        folder: of the run.
        iterations: completed iterations; products of a shorter training are recreated.
        products: all products.
        between: called before each product; exceptions end the loop.
    Raises: the first error of a required product, after all others have been tried.
    """

    def make_all() -> None:
        failure: Exception | None = None
        for product in sorted(products, key=lambda p: not p.required):
            between()
            if not folder.has_product(product.name, iterations):
                error = _make_product(product, folder, iterations)
                failure = failure or error
        if failure is not None:
            raise failure

    in_first_process(make_all)


def _make_product(product: Product, folder: RunFolder, iterations: int) -> Exception | None:
    """Create and record a product; return the error of a required one, log that of an optional."""
    try:
        if product.make():
            folder.note_product(product.name, iterations)
    except Exception as error:
        if product.required:
            return error
        logger.warning(
            "Could not create %s (%s: %s). The run is complete without it; --resume retries.",
            folder.path / product.name,
            type(error).__name__,
            error,
        )
        logger.debug("Traceback:", exc_info=error)
    return None


def write_results(folder: Path, iteration: int, results: Mapping[str, Any]) -> None:
    """Save the results of an evaluation, so that a finished run does not repeat it."""
    text = json.dumps({"iteration": iteration, "results": results}, default=float)
    write_text(folder / RESULTS, text)


def read_results(folder: Path, iteration: int) -> dict[str, Any] | None:
    """Read the evaluation results of an iteration; None if there are none."""
    try:
        content = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return dict(content["results"]) if content.get("iteration") == iteration else None
