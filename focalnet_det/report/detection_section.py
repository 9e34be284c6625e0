"""Report boxes and masks: precision-recall curves, error types, confusions and example images."""

import contextlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hotcoco
import hotcoco.plot
import numpy as np
import torch
from detectron2.data import DatasetCatalog, Metadata
from detectron2.structures import Boxes, Instances

from ..evaluation.coco_ap import TASK_FIELDS
from ..visualization.draw_instances import compare_instances
from .page import Note, Page, chart, columns, photo, side_by_side, table

TITLES = {"bbox": "boxes", "segm": "masks"}
# Number of worst and of best images.
IMAGES = 3
MIN_SCORE = 0.5
LARGEST_MATRIX = 25

# Source: arXiv:2008.08115, section 2.2.
ERROR_TYPES = {
    "Cls": "correct location, but wrong class",
    "Loc": "correct class, but an IoU of only 0.1 to 0.5",
    "Both": "wrong class, and an IoU of only 0.1 to 0.5",
    "Dupe": "duplicate of a better detection of the same object",
    "Bkg": "background, without any object at an IoU of 0.1",
    "Miss": "undetected object not covered by another error type",
}


def add_detection(
    page: Page, results: Mapping[str, Any], metadata: Metadata, folder: Path, max_dets: int
) -> None:
    """Add the sections of boxes and masks.

    Args:
        page: report.
        results: {task: {metric: percent}} of the evaluation.
        metadata: of the dataset.
        folder: output folder of the evaluation, with ``coco_instances_results.json``; the charts
            are written there.
        max_dets: detections per image and class that count for AP.
    """
    # hotcoco requests fonts that are rarely installed, and matplotlib warns about each.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    records = json.loads((folder / "coco_instances_results.json").read_text())
    tasks = [task for task in TITLES if task in results]
    if not records or not tasks:
        page.add("Detections", "The model predicted none.")
        return
    truth = hotcoco.COCO(str(metadata.json_file))
    for task in tasks:
        _add_task(page, evaluate_records(truth, records, task, max_dets), task, folder)
    confident = [record for record in records if record["score"] >= MIN_SCORE]
    if confident:
        scorer = evaluate_records(truth, confident, tasks[-1], max_dets)
        summary = scorer.image_diagnostics()["img_summary"]
        _add_images(page, summary, confident, metadata, tasks[-1])


def evaluate_records(
    truth: Any, records: Sequence[Mapping[str, Any]], task: str, max_dets: int
) -> Any:
    """Run hotcoco's COCOeval for one task, and return it.

    Args:
        truth: hotcoco.COCO.
        records: COCO results.
        task: "bbox" or "segm".
        max_dets: detections per image and class that count for AP.
    """
    # COCO computes areas from boxes if present, but masks need their own area.
    keys = ("image_id", "category_id", "score", TASK_FIELDS[task][1])
    results = [{key: record[key] for key in keys} for record in records]
    scorer = hotcoco.COCOeval(truth, truth.load_res(results), task)
    scorer.params.max_dets = sorted({1, 10, max_dets})
    scorer.evaluate()
    scorer.accumulate()
    with contextlib.redirect_stdout(io.StringIO()):
        scorer.summarize()  # required by the charts
    return scorer


def _add_task(page: Page, scorer: Any, task: str, folder: Path) -> None:
    title = TITLES[task]
    sweep, _ = hotcoco.plot.pr_curve_iou_sweep(scorer, paper_mode=True)
    by_class, _ = hotcoco.plot.pr_curve_top_n(scorer, top_n=10, paper_mode=True)
    page.add(
        f"Precision and recall of {title}",
        "Left: mean over the classes, for IoU thresholds of 0.5 to 0.95. Right: the ten best "
        "classes at an IoU of 0.5.",
        columns(
            chart(sweep, folder / f"pr_{task}.png"),
            chart(by_class, folder / f"pr_classes_{task}.png"),
        ),
    )
    errors = scorer.tide_errors()
    figure, _ = hotcoco.plot.tide_errors(errors, paper_mode=True)
    rows = [
        [Note(f"{kind}: {meaning}"), str(errors["counts"][kind]), 100 * errors["delta_ap"][kind]]
        for kind, meaning in ERROR_TYPES.items()
    ]
    page.add(
        f"Errors of {title}",
        f"AP50 is {100 * errors['ap_base']:.1f}. The table shows its increase if only one type of "
        "error were fixed (TIDE).",
        columns(
            chart(figure, folder / f"errors_{task}.png"),
            table(["", "count", "AP50 lost"], rows),
        ),
    )
    confusion = scorer.confusion_matrix(min_score=MIN_SCORE)
    top = LARGEST_MATRIX if confusion["num_cats"] > LARGEST_MATRIX else None
    figure, _ = hotcoco.plot.confusion_matrix(confusion, top_n=top, paper_mode=True)
    page.add(
        f"Confusions of {title}",
        f"Detections with scores of at least {MIN_SCORE:.0%}, matched at an IoU of 0.5 regardless "
        "of class. Rows are true classes; BG (background) counts missed objects and false "
        "detections.",
        chart(figure, folder / f"confusion_{task}.png"),
    )


def ranked(summary: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Sort image ids by F1 and number of errors, worst first.

    Images without both objects and detections are excluded.
    """

    def key(image_id: int) -> tuple[float, float]:
        row = summary[image_id]
        return row["f1"], row["tp"] - row["fp"] - row["fn"]

    used = [i for i, row in summary.items() if row["tp"] + row["fp"] + row["fn"]]
    return sorted(used, key=key)


def _add_images(
    page: Page,
    summary: Mapping[int, Mapping[str, Any]],
    records: Sequence[Mapping[str, Any]],
    metadata: Metadata,
    task: str,
) -> None:
    order = ranked(summary)
    by_id = {record["image_id"]: record for record in DatasetCatalog.get(metadata.name)}
    order = [image_id for image_id in order if image_id in by_id]
    count = min(IMAGES, len(order) // 2)
    ends = {"Worst images": order[:count], "Best images": order[::-1][:count]}
    for title, image_ids in ends.items():
        photos = []
        for image_id in image_ids:
            record, row = by_id[image_id], summary[image_id]
            detections = [r for r in records if r["image_id"] == image_id]
            instances = to_instances(detections, metadata, (record["height"], record["width"]))
            compared = compare_instances(record, {"instances": instances}, metadata, MIN_SCORE)
            pair = side_by_side([picture for _, picture in compared.panels[1:]])
            caption = (
                f"{Path(record['file_name']).name}: F1 {row['f1']:.2f}; {row['tp']} correct, "
                f"{row['fn']} missed, {row['fp']} false"
            )
            photos.append(photo(pair, caption))
        if photos:
            page.add(
                title,
                f"Ground truth, and detections with scores of at least {MIN_SCORE:.0%}; missed and "
                "false ones have dashed frames. F1 and counts refer to "
                f"{TITLES[task]} at an IoU of 0.5.",
                *photos,
            )


def to_instances(
    records: Sequence[Mapping[str, Any]], metadata: Metadata, size: tuple[int, int]
) -> Instances:
    """Convert COCO results of one image to Detectron2's instances.

    Args:
        records: COCO results.
        metadata: of the dataset.
        size: height and width of the image, pixels.
    """
    classes = metadata.thing_dataset_id_to_contiguous_id
    instances = Instances(size)
    boxes = np.array([record["bbox"] for record in records], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]  # xywh -> xyxy
    instances.pred_boxes = Boxes(torch.from_numpy(boxes))
    instances.scores = torch.tensor([float(record["score"]) for record in records])
    instances.pred_classes = torch.tensor(
        [classes[record["category_id"]] for record in records], dtype=torch.int64
    )
    if records and "segmentation" in records[0]:
        masks = [np.asarray(hotcoco.mask.decode(record["segmentation"])) for record in records]
        instances.pred_masks = torch.from_numpy(np.stack(masks).astype(bool))
    return instances
