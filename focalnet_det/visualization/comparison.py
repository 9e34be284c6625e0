"""Save ground truth beside what a model predicts, a row for each image."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.data import Metadata
from torch import nn

from .sheet import Row, save_page

# Draws (record, output of the model, metadata, score threshold).
Compare = Callable[[dict[str, Any], dict[str, Any], Metadata, float], Row]


def save_comparison(
    model: nn.Module,
    records: Sequence[dict[str, Any]],
    inputs: Sequence[dict[str, Any]],
    metadata: Metadata,
    path: Path,
    *,
    compare: Compare,
    min_score: float = 0.5,
) -> None:
    """Save a PNG with a row for each image: image, ground truth, prediction.

    Args:
        model: a Detectron2 model in eval mode.
        records: in Detectron2's format, with annotations.
        inputs: model inputs of the same images.
        metadata: of the dataset.
        path: PNG to write.
        compare: draws a row, such as
            :func:`~focalnet_det.visualization.draw_instances.compare_instances`.
        min_score: score threshold of instances.
    """
    rows = []
    for record, item in zip(records, inputs, strict=True):
        with torch.no_grad():
            output = model([item])[0]
        rows.append(compare(record, output, metadata, min_score))
    save_page(rows, path)
