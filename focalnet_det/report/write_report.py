"""Write the HTML report of an evaluation from the output files of evaluation and training."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

from ..atomic import write_text
from ..evaluation.classification_accuracy import METRICS_FILE as CLASSIFICATION_METRICS
from ..visualization.curves import save_curves
from .classification_section import add_classification
from .detection_section import add_detection
from .page import Bar, Page, saved_chart, table
from .semantic_section import add_semantic

logger = logging.getLogger("focalnet_det")

# Metrics shown as key figures at the top.
MAIN_METRICS = ("AP", "mIoU", "PQ", "top1", "top5")
TASKS = {
    "bbox": "boxes",
    "segm": "masks",
    "keypoints": "keypoints",
    "sem_seg": "semantic segmentation",
    "panoptic_seg": "panoptic segmentation",
    "classification": "classification",
    "masked_images": "masked pixels",
}


def write_report(
    name: str,
    results: Mapping[str, Mapping[str, float]],
    folder: Path,
    *,
    weights: str = "",
    max_dets: int = 100,
    run: Path | None = None,
) -> Path:
    """Write ``report.html`` and its charts into the output folder of an evaluation.

    Args:
        name: registered dataset.
        results: {task: {metric: percent}}; "AP-person" is the AP of a class.
        folder: output folder of the evaluator.
        weights: description of the evaluated checkpoint.
        max_dets: detections per image and class that count for AP.
        run: output folder of the training, for its curves; None for none.
    Returns: path of the report.
    """
    metadata = MetadataCatalog.get(name)
    details = [f"{len(DatasetCatalog.get(name)):,} images", weights]
    page = Page(title=f"Evaluation on {name}", subtitle=", ".join(filter(None, details)))
    add_metrics(page, results)
    metrics = None if run is None else run / "metrics.json"
    if metrics is not None and metrics.exists():
        curves = metrics.with_name("curves.png")
        if save_curves(metrics, curves):
            page.add("Training", "", saved_chart(curves))
    if (folder / "coco_instances_results.json").exists() and _has_truth(metadata, results):
        add_detection(page, results, metadata, folder, max_dets)
    if (folder / "sem_seg_metrics.json").exists() and "sem_seg" in results:
        add_semantic(page, metadata, folder)
    if (folder / CLASSIFICATION_METRICS).exists() and "classification" in results:
        add_classification(page, folder)
    path = folder / "report.html"
    write_text(path, page.html(), durable=False)
    logger.info("Saved report to %s.", path)
    return path


def _has_truth(metadata: Metadata, results: Mapping[str, Any]) -> bool:
    return metadata.get("json_file") is not None and bool({"bbox", "segm"} & set(results))


def add_metrics(page: Page, results: Mapping[str, Mapping[str, float]]) -> None:
    """Add key figures, and tables of overall and per-class metrics.

    Tasks with the same metrics share a table.
    """
    means: dict[tuple[str, ...], list[list[Any]]] = {}
    classes: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    for task, metrics in results.items():
        title = TASKS.get(task, task)
        page.tiles += [
            (f"{metric}, {title}", f"{metrics[metric]:.1f}")
            for metric in MAIN_METRICS
            if not math.isnan(metrics.get(metric, math.nan))
        ]
        names = tuple(name for name in metrics if "-" not in name)
        means.setdefault(names, []).append([title, *(float(metrics[name]) for name in names)])
        rows = per_class(metrics)
        merged = classes.setdefault(tuple(rows), {})
        for cls, values in rows.items():
            suffix = f", {title}" if len(results) > 1 else ""
            columns = {f"{kind}{suffix}": value for kind, value in values.items()}
            merged[cls] = merged.get(cls, {}) | columns
    tables = [table(["", *names], rows) for names, rows in means.items()]
    unit = "In percent; - if undefined."
    if "masked_images" in results:
        unit = "Mean absolute error of normalized pixels."
    page.add("Metrics", unit, *tables)
    for rows in filter(None, classes.values()):
        kinds = list(dict.fromkeys(kind for values in rows.values() for kind in values))
        body = [
            [cls, *(Bar(values.get(kind, math.nan)) for kind in kinds)]
            for cls, values in rows.items()
        ]
        page.add("Classes", "In percent.", table(["", *kinds], body))


def per_class(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Group metrics such as "AP-person" to {class: {metric: value}}."""
    rows: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        kind, dash, cls = name.partition("-")
        if dash:
            rows.setdefault(cls, {})[kind] = value
    return rows
