"""Build the evaluators of registered datasets."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils.file_io import PathManager

from focalnet_det.evaluation.boundary_ap import BoundaryEvaluator
from focalnet_det.evaluation.classification_accuracy import ClassificationEvaluator
from focalnet_det.evaluation.coco_ap import COCODetectionEvaluator
from focalnet_det.evaluation.panoptic_quality import PanopticEvaluator
from focalnet_det.evaluation.reconstruction import ReconstructionEvaluator
from focalnet_det.evaluation.semantic_iou import SemanticEvaluator


def _coco(
    metadata: Metadata,
    *,
    output_dir: Any,
    tasks: Any,
    max_dets: int,
    boundary: bool = False,
    **_: Any,
) -> DatasetEvaluator:
    json_file = metadata.get("json_file")
    if json_file is None:
        raise KeyError(f"Metadata of {metadata.name!r} lacks json_file, the COCO annotation file.")
    names, ids = (metadata.get(f"thing_{k}") for k in ("classes", "dataset_id_to_contiguous_id"))
    if names is not None and ids is not None:
        # `thing_classes` of panoptic datasets in the unified layout includes stuff.
        names = [names[k] for k in sorted(ids.values()) if k < len(names)]
    common = {
        "json_file": PathManager.get_local_path(json_file),
        "image_root": metadata.get("image_root"),
        "class_names": names,
        "thing_dataset_id_to_contiguous_id": ids,
        "output_dir": output_dir,
        "max_dets": max_dets,
    }
    evaluator = COCODetectionEvaluator(**common, tasks=tasks)
    return DatasetEvaluators([evaluator, BoundaryEvaluator(**common)]) if boundary else evaluator


def _sem_seg(
    metadata: Metadata, *, output_dir: Any, save_predictions: bool, **_: Any
) -> DatasetEvaluator:
    classes = metadata.get("stuff_classes")
    if classes is None:
        raise KeyError(f"Metadata of {metadata.name!r} lacks stuff_classes, the class names.")
    return SemanticEvaluator(
        class_names=classes,
        output_dir=output_dir,
        save_predictions=save_predictions,
        image_root=metadata.get("image_root"),
        colors=metadata.get("stuff_colors"),
    )


def _panoptic(
    metadata: Metadata, *, output_dir: Any, save_predictions: bool, **others: Any
) -> DatasetEvaluator:
    """Evaluate PQ and mIoU, and box and mask AP if there are instances, as Detectron2 does."""
    missing = [k for k in ("panoptic_json", "panoptic_root") if metadata.get(k) is None]
    if missing:
        raise KeyError(f"Metadata of {metadata.name!r} lacks {' and '.join(missing)}.")
    common = {"output_dir": output_dir, "save_predictions": save_predictions}
    evaluators: list[DatasetEvaluator] = [_sem_seg(metadata, **common)]
    if metadata.get("json_file") is not None:
        evaluators.insert(0, _coco(metadata, **common, **others))
    panoptic = PanopticEvaluator(
        panoptic_json=PathManager.get_local_path(metadata.panoptic_json),
        panoptic_root=metadata.panoptic_root,
        thing_ids=metadata.get("thing_dataset_id_to_contiguous_id"),
        stuff_ids=metadata.get("stuff_dataset_id_to_contiguous_id"),
        **common,
    )
    return DatasetEvaluators([*evaluators, panoptic])


def _classification(
    metadata: Metadata, *, output_dir: Any, save_predictions: bool, **_: Any
) -> DatasetEvaluator:
    classes = metadata.get("thing_classes")
    if classes is None:
        raise KeyError(f"Metadata of {metadata.name!r} lacks thing_classes, the class names.")
    return ClassificationEvaluator(
        class_names=classes, output_dir=output_dir, save_predictions=save_predictions
    )


def _unlabeled(_metadata: Metadata, *, output_dir: Any, **_: Any) -> DatasetEvaluator:
    return ReconstructionEvaluator(output_dir=output_dir)


# `evaluator_type` of the metadata -> factory(metadata, output_dir=, tasks=, max_dets=,
# save_predictions=, boundary=).
EVALUATORS: dict[str, Callable[..., DatasetEvaluator]] = {
    "coco": _coco,
    "coco_panoptic_seg": _panoptic,
    "sem_seg": _sem_seg,
    "classification": _classification,
    "unlabeled": _unlabeled,
}


def build_evaluator(
    dataset_name: str,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    tasks: Sequence[str] | None = None,
    max_dets: int = 100,
    save_predictions: bool = False,
    boundary: bool = False,
) -> DatasetEvaluator:
    """Build the evaluator of a dataset registered in Detectron2.

    Args:
        dataset_name: registered name.
        output_dir: folder for results and metrics; None writes nothing.
        tasks: tasks to evaluate, such as ("bbox", "segm"); None for all fields of the predictions.
        max_dets: detections per image and class that count for AP.
        save_predictions: also write a PNG per image ("sem_seg" and "coco_panoptic_seg" only).
        boundary: also evaluate boundary AP.
    Raises: KeyError if the dataset's evaluator_type is missing or unknown.
    """
    metadata = MetadataCatalog.get(dataset_name)
    evaluator_type = metadata.get("evaluator_type")
    if evaluator_type not in EVALUATORS:
        raise KeyError(
            f"Unknown evaluator_type {evaluator_type!r} of dataset {dataset_name!r}. "
            f"Known: {', '.join(sorted(EVALUATORS))}. Check that the dataset is registered."
        )
    return EVALUATORS[evaluator_type](
        metadata,
        output_dir=output_dir,
        tasks=tasks,
        max_dets=max_dets,
        save_predictions=save_predictions,
        boundary=boundary,
    )
