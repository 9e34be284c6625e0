"""Panoptic maps of rectangles, and their quality by its definition."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from focalnet_det.evaluation import PanopticEvaluator

CATEGORIES = [
    {"id": 3, "name": "cat", "isthing": 1},
    {"id": 5, "name": "dog", "isthing": 1},
    {"id": 11, "name": "sky", "isthing": 0},
    {"id": 20, "name": "grass", "isthing": 0},
    {"id": 21, "name": "sand", "isthing": 0},
]


def panoptic_quality(pairs: list[tuple[Any, ...]], categories: list[dict]) -> dict[str, float]:
    """PQ, SQ, RQ as the paper defines them, with COCO's rules for void and crowds; percent.

    pairs: per image, the true and the predicted map of ids, and the segments of each.
    """
    counts: dict[int, list[float]] = defaultdict(lambda: [0.0, 0, 0, 0])
    for truth, predicted, true_segments, predicted_segments in pairs:
        void = truth == 0
        matched_g, matched_p = set(), set()
        for p in predicted_segments:
            for g in true_segments:
                if g["category_id"] != p["category_id"] or g.get("iscrowd"):
                    continue
                in_p, in_g = predicted == p["id"], truth == g["id"]
                union = ((in_p | in_g) & ~(in_p & void)).sum()
                iou = (in_p & in_g).sum() / union
                if iou > 0.5:
                    counts[p["category_id"]][0] += iou
                    counts[p["category_id"]][1] += 1
                    matched_p.add(p["id"])
                    matched_g.add(g["id"])
        for g in true_segments:
            if not g.get("iscrowd") and g["id"] not in matched_g:
                counts[g["category_id"]][3] += 1
        for p in predicted_segments:
            if p["id"] in matched_p:
                continue
            in_p, ignored = predicted == p["id"], void.copy()
            for g in true_segments:
                if g.get("iscrowd") and g["category_id"] == p["category_id"]:
                    ignored |= truth == g["id"]
            if (in_p & ignored).sum() / in_p.sum() <= 0.5:
                counts[p["category_id"]][2] += 1
    result = {}
    for suffix, kinds in (("", (0, 1)), ("_th", (1,)), ("_st", (0,))):
        rows = []
        for category in categories:
            iou, tp, fp, fn = counts[category["id"]]
            if category["isthing"] in kinds and tp + fp + fn:
                rq = tp / (tp + fp / 2 + fn / 2)
                sq = iou / tp if tp else 0.0
                rows.append((sq * rq, sq, rq))
        means = np.mean(rows, axis=0) if rows else [math.nan] * 3
        result |= {f"{q}{suffix}": 100 * v for q, v in zip(("PQ", "SQ", "RQ"), means, strict=True)}
    return result


def write_set(root: Path, images: dict[int, tuple[np.ndarray, list[dict]]]) -> Path:
    """A panoptic set of maps of ids and their segments, by image id."""
    (root / "png").mkdir(parents=True, exist_ok=True)
    annotations = []
    for image_id, (ids, segments) in images.items():
        rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        Image.fromarray(rgb).save(root / "png" / f"{image_id}.png")
        row = {"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": segments}
        annotations.append(row)
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in images],
        "annotations": annotations,
        "categories": CATEGORIES,
    }
    (root / "panoptic.json").write_text(json.dumps(content))
    return root


def evaluator(root: Path, **options: Any) -> PanopticEvaluator:
    return PanopticEvaluator(
        panoptic_json=root / "panoptic.json", panoptic_root=root / "png", **options
    )


def feed(scorer: PanopticEvaluator, image_id: int, ids: Any, segments: list[dict] | None) -> None:
    output = {"panoptic_seg": (torch.as_tensor(np.asarray(ids)), segments)}
    scorer.process([{"image_id": image_id}], [output])


def blocks(seed: int, shape: tuple[int, int] = (40, 60)) -> tuple[np.ndarray, list[dict]]:
    """Rectangles on one another, with void, and a crowd in some."""
    rng = np.random.default_rng(seed)
    ids = np.zeros(shape, dtype=np.int64)
    for number in range(1, 10):
        y, x = rng.integers(0, shape[0]), rng.integers(0, shape[1])
        ids[y : y + rng.integers(4, 30), x : x + rng.integers(4, 40)] = 70_000 * number + 5
    present = [int(i) for i in np.unique(ids) if i]
    segments = [
        {"id": i, "category_id": CATEGORIES[int(rng.integers(5))]["id"], "iscrowd": 0}
        for i in present
    ]
    things = [s for s in segments if s["category_id"] == 3]
    if things and seed % 2:
        things[0]["iscrowd"] = 1
    return ids, segments


def perturbed(ids: np.ndarray, segments: list[dict], seed: int) -> tuple[np.ndarray, list[dict]]:
    """Shifted, with holes that are void, some classes changed, other ids."""
    rng = np.random.default_rng(1000 + seed)
    moved = np.roll(ids, rng.integers(-3, 4, 2), axis=(0, 1))
    moved[rng.random(moved.shape) < 0.05] = 0
    result, changed = np.zeros_like(moved), []
    known = [s["category_id"] for s in segments]
    for number, segment in enumerate(segments, start=1):
        where = moved == segment["id"]
        if not where.any() or rng.random() < 0.1:
            continue
        result[where] = number
        category = known[rng.integers(len(known))] if rng.random() < 0.2 else segment["category_id"]
        changed.append({"id": number, "category_id": int(category)})
    return result, changed


def as_predictions(segments: list[dict]) -> list[dict]:
    """With the classes of Detectron2's panoptic FPN in place of category ids."""
    things = [c["id"] for c in CATEGORIES if c["isthing"]]
    stuff = [c["id"] for c in CATEGORIES if not c["isthing"]]
    return [
        {
            "id": s["id"],
            "isthing": s["category_id"] in things,
            "category_id": things.index(s["category_id"])
            if s["category_id"] in things
            else 1 + stuff.index(s["category_id"]),
        }
        for s in segments
    ]
