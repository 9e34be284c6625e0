"""Evaluate the reconstruction of masked images as a Detectron2 evaluator."""

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from focalnet_det.atomic import write_text

logger = logging.getLogger(__name__)


class ReconstructionEvaluator(DatasetEvaluator):
    """Evaluator of the mean absolute error of masked pixels, over all images.

    It is the loss of the pretraining, in units of normalized pixels. The main rank scores the
    images of all ranks; the others return an empty dict.

    Args:
        output_dir: folder for `reconstruction_metrics.json`; None writes nothing.
        distributed: gather the results of all ranks.
    """

    def __init__(
        self, *, output_dir: str | os.PathLike[str] | None = None, distributed: bool = True
    ) -> None:
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._distributed = distributed
        self.reset()

    def reset(self) -> None:
        """Discard all results."""
        self._losses: list[float] = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Any]) -> None:  # noqa: ARG002
        """Note the losses of a batch of images: outputs are dicts with "masked_image"."""
        self._losses += [float(output["masked_image"]["loss"]) for output in outputs]

    def evaluate(self) -> "OrderedDict[str, dict[str, float]]":
        """Return metrics, {"masked_images": {"L1": ...}}."""
        parts = comm.gather(self._losses, dst=0) if self._distributed else [self._losses]
        if self._distributed and not comm.is_main_process():
            return OrderedDict()
        losses = [loss for part in parts for loss in part]
        if not losses:
            logger.warning("No images were processed. There is nothing to evaluate.")
            return OrderedDict()
        metrics = {"L1": sum(losses) / len(losses)}
        logger.info("Masked pixels of %d images: L1 error %.4f.", len(losses), metrics["L1"])
        if self._output_dir is not None:
            path = self._output_dir / "reconstruction_metrics.json"
            write_text(path, json.dumps({"metrics": metrics, "images": len(losses)}))
        return OrderedDict(masked_images=metrics)
