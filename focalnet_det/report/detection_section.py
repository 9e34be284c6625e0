"""Boxes and masks: precision over recall, error types, confusions, best and worst images."""

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
from ..visualization.draw_instances import draw_ground_truth, draw_predictions
from .page import Note, Page, chart, columns, photo, side_by_side, table

TITLES = {"bbox": "boxes", "segm": "masks"}
# Images at either end of the ranking.
IMAGES = 3
MIN_SCORE = 0.5
LARGEST_MATRIX = 25

# Source: arXiv:2008.08115, section 2.2.
ERROR_TYPES = {
    "Cls": "the right place, but another class",
    "Loc": "the right class, but an overlap of 0.1 to 0.5 only",
    "Both": "another class, and an overlap of 0.1 to 0.5 only",
    "Dupe": "an object that a better detection has found already",
    "Bkg": "background: no object overlaps it by 0.1",
    "Miss": "an object that no detection of any kind above explains",
}


def add_detection(
    page: Page, results: Mapping[str, Any], metadata: Metadata, folder: Path, max_dets: int
) -> None:
    """Adds the sections of every task among boxes and masks.

    Args:
        results: {task: {metric: percent}} of the evaluation.
        folder: of the evaluation, with ``coco_instances_results.json``; gets the charts.
    """
    # hotcoco asks for weights of fonts that few machines have.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    records = json.loads((folder / "coco_instances_results.json").read_text())
    tasks = [task for task in TITLES if task in results]
    if not records or not tasks:
        page.add("Detections", "There are none: nothing to draw.")
        return
    truth = hotcoco.COCO(str(metadata.json_file))
    for task in tasks:
        _add_task(page, matched(truth, records, task, max_dets), task, folder)
    shown = [record for record in records if record["score"] >= MIN_SCORE]
    if shown:
        summary = matched(truth, shown, tasks[-1], max_dets).image_diagnostics()["img_summary"]
        _add_images(page, summary, shown, metadata, tasks[-1])


def matched(truth: Any, records: Sequence[Mapping[str, Any]], task: str, max_dets: int) -> Any:
    """Hotcoco's evaluator of one task, accumulated.

    Args:
        truth: hotcoco.COCO.
        records: of a COCO results file.
    """
    # COCO takes an area from the box if there is one; masks need their own.
    keys = ("image_id", "category_id", "score", TASK_FIELDS[task][1])
    found = [{key: record[key] for key in keys} for record in records]
    scorer = hotcoco.COCOeval(truth, truth.load_res(found), task)
    scorer.params.max_dets = sorted({1, 10, max_dets})
    scorer.evaluate()
    scorer.accumulate()
    with contextlib.redirect_stdout(io.StringIO()):
        scorer.summarize()  # the charts ask for it
    return scorer


def _add_task(page: Page, scorer: Any, task: str, folder: Path) -> None:
    title = TITLES[task]
    sweep, _ = hotcoco.plot.pr_curve_iou_sweep(scorer, paper_mode=True)
    by_class, _ = hotcoco.plot.pr_curve_top_n(scorer, top_n=10, paper_mode=True)
    page.add(
        f"Precision and recall of {title}",
        "Left: the mean over the classes, for overlaps (IoU) of 0.5 to 0.95. Right: the ten best "
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
        f"AP50 is {100 * errors['ap_base']:.1f}. By how much it would rise if one type of error "
        "alone were mended (TIDE).",
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
        f"Detections of at least {MIN_SCORE:.0%}, matched at an IoU of 0.5 whatever their class. "
        "Rows are true classes; BG is the background: objects missed, and detections of nothing.",
        chart(figure, folder / f"confusion_{task}.png"),
    )


def ranked(summary: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Image ids, worst first: by F1, then by the number of errors; images without objects and
    detections are left out.
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
    for title, chosen in ends.items():
        photos = []
        for image_id in chosen:
            record, row = by_id[image_id], summary[image_id]
            found = [r for r in records if r["image_id"] == image_id]
            instances = to_instances(found, metadata, (record["height"], record["width"]))
            pair = side_by_side(
                [
                    draw_ground_truth(record, metadata),
                    draw_predictions(record, instances, metadata, min_score=MIN_SCORE),
                ]
            )
            caption = (
                f"{Path(record['file_name']).name}: F1 {row['f1']:.2f}; {row['tp']} found, "
                f"{row['fn']} missed, {row['fp']} wrong"
            )
            photos.append(photo(pair, caption))
        if photos:
            page.add(
                title,
                f"Ground truth, and detections of at least {MIN_SCORE:.0%}. F1 and counts are of "
                f"{TITLES[task]} at an IoU of 0.5.",
                *photos,
            )


def to_instances(
    records: Sequence[Mapping[str, Any]], metadata: Metadata, size: tuple[int, int]
) -> Instances:
    """Detectron2's instances of one image from COCO results; size is (height, width)."""
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
