"""Compare an exported graph with the model that it was made from."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ...heads.mmdet.rcnn import MmdetRCNN
from .graph_detectors import GraphDetector, GraphRCNN
from .graph_models import GraphMask2Former, GraphModel, GraphSegmentor

Arrays = Mapping[str, NDArray[Any]]
# Calls a graph: inputs by name to results by name.
Run = Callable[[Arrays], Arrays]

# Largest differences of values of order one, and of boxes in pixels.
TOLERANCE, BOX_TOLERANCE = 1e-4, 1e-2
# Above the scores of all detections: an image without objects.
NO_OBJECTS = 2.0


class ExportError(ValueError):
    """A graph that does not compute what its model computes."""


@dataclass(frozen=True)
class Comparison:
    """The results of a graph for one batch, beside those of the model.

    Attributes:
        batch: what was compared, such as "2 x 96 x 128".
        differences: largest difference by name of the result; of "boxes" in pixels, of others
            relative to the largest expected value where that is above one.
        detections: number of detections that were compared, None if the model makes none.
    """

    batch: str
    differences: dict[str, float]
    detections: int | None = None

    def problems(self) -> list[str]:
        """Return what differs by more than the tolerance."""
        return [
            f"{name} differ by {difference:.2g} for {self.batch}"
            for name, difference in self.differences.items()
            if not difference <= (BOX_TOLERANCE if name == "boxes" else TOLERANCE)
        ]


def verify(
    graph: GraphModel, model: nn.Module, run: Run, sizes: Sequence[tuple[int, int]]
) -> list[Comparison]:
    """Compare a graph with its model on noise, a batch of two, and an image without objects.

    Args:
        graph: says what the results are.
        model: that it was made from; it is called as the evaluation calls it.
        run: calls the exported graph.
        sizes: (height, width) of the images, pixels; the first is that of the batch of two.
    Returns: what was compared.
    Raises: ExportError that names what differs, or if no detection was compared.
    """
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(1, graph.channels, *size, generator=generator) * 255 for size in sizes]
    batches.append(torch.rand(2, graph.channels, *sizes[0], generator=generator) * 255)
    if not graph.has_threshold:
        batches.append(torch.zeros(1, graph.channels, *sizes[0]))
        comparisons = [_compare(graph, model, run, batch, None) for batch in batches]
    else:
        threshold = _threshold_with_detections(graph, model, batches[-1])
        comparisons = [_compare(graph, model, run, batch, threshold) for batch in batches]
        comparisons.append(_compare(graph, model, run, batches[0], NO_OBJECTS))
    if problems := [text for c in comparisons for text in c.problems()]:
        raise ExportError(f"The graph does not compute what the model does: {'; '.join(problems)}.")
    return comparisons


def _threshold_with_detections(graph: GraphModel, model: nn.Module, images: Tensor) -> float:
    """Return the model's own threshold, or the first lower one at which it detects something.

    Raises: ExportError if it detects nothing in noise at any threshold.
    """
    own = _thresholds(model)[0].test_score_thresh
    for threshold in (own, own / 10, own / 100, 0.0):
        if any(
            len(image["scores"]) for image in _expected_detections(graph, model, images, threshold)
        ):
            return float(threshold)
    raise ExportError("The model detects nothing at any threshold: there is nothing to compare.")


def _compare(
    graph: GraphModel, model: nn.Module, run: Run, images: Tensor, threshold: float | None
) -> Comparison:
    inputs = {"images": images.numpy()}
    name = " x ".join(str(side) for side in (images.shape[0], *images.shape[2:]))
    if threshold is not None:
        inputs["threshold"] = np.asarray(threshold, dtype=np.float32)
    if threshold == NO_OBJECTS or not images.any():
        name += ", empty"
    actual = run(inputs)
    differences: dict[str, float] = {}
    detections = None
    if threshold is not None:
        expected = _expected_detections(graph, model, images, threshold)
        detections = sum(len(image["scores"]) for image in expected)
        for number, image in enumerate(expected):
            for key, value in _compare_detections(image, _rows_of(actual, number)).items():
                differences[key] = max(differences.get(key, 0.0), value)
    for key, feature in _expected_maps(graph, model, images).items():
        differences[key] = _difference(feature, actual[key])
    return Comparison(name, differences, detections)


def _difference(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Return the largest difference, relative to the largest value where that is above one."""
    if expected.shape != actual.shape:
        return math.inf
    if not expected.size:
        return 0.0
    scale = max(1.0, float(np.abs(expected).max()))
    # Not `max`, which drops NaN in one of two orders.
    return float(np.abs(expected - actual).max()) / scale


def _expected_maps(graph: GraphModel, model: Any, images: Tensor) -> dict[str, NDArray[Any]]:
    """Compute what the model itself gives for a batch, apart from detections."""
    inputs = _to_model(graph, images)
    with torch.inference_mode():
        if isinstance(graph, GraphSegmentor):
            found = [model([{"image": image}])[0]["sem_seg"] for image in inputs]
            return {"logits": torch.stack(found).numpy()}
        if isinstance(graph, GraphMask2Former):
            prediction = _raw_prediction(model, inputs)
            return {key: value.numpy() for key, value in prediction.items()}
        if isinstance(graph, GraphRCNN):
            if "logits" not in graph.outputs:
                return {}
            found = [model([{"image": image}])[0]["sem_seg"] for image in inputs]
            return {"logits": torch.stack(found).numpy()}
        if isinstance(graph, GraphDetector):
            return {}
        return {name: value.numpy() for name, value in model(images).items()}


def _raw_prediction(model: Any, images: Tensor) -> dict[str, Tensor]:
    """Record what the head of a Mask2Former hands to the results of a batch."""
    recorded: list[Any] = []
    handle = model.sem_seg_head.register_forward_hook(
        lambda _module, _inputs, output: recorded.append(output[-1])
    )
    try:
        model([{"image": image} for image in images])
    finally:
        handle.remove()
    parts = [(p.class_logits, p.mask_logits()) for p in recorded]
    classes, masks = (torch.cat(part) for part in zip(*parts, strict=True))
    return {"class_logits": classes, "mask_logits": masks}


def _to_model(graph: GraphModel, images: Tensor) -> Tensor:
    return images.flip(1) if graph.reverse_channels else images


def _thresholds(model: Any) -> list[Any]:
    """Return the modules that hold the least score of a detection."""
    heads = getattr(model, "roi_heads", None)
    if heads is None:
        return [model]
    predictor = heads.box_predictor
    return list(predictor) if isinstance(predictor, nn.ModuleList) else [predictor]


@contextmanager
def _threshold_set(model: nn.Module, threshold: float) -> Iterator[None]:
    """Give the model another least score within a block."""
    modules = _thresholds(model)
    before = [module.test_score_thresh for module in modules]
    for module in modules:
        # A float32, as the graph compares with.
        module.test_score_thresh = float(np.float32(threshold))
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.test_score_thresh = value


def _expected_detections(
    graph: GraphModel, model: Any, images: Tensor, threshold: float
) -> list[Arrays]:
    """Compute the detections of the model itself, image by image."""
    records = [{"image": image} for image in _to_model(graph, images)]
    with torch.inference_mode(), _threshold_set(model, threshold):
        if not isinstance(graph, GraphRCNN):
            return [_arrays(output["instances"]) for output in model(records)]
        # Masks are compared before they are pasted into the image. Without that step, empty boxes
        # are still there, which Detectron2 then removes.
        found = model.inference(records, do_postprocess=False)
    if isinstance(found, tuple):  # of a panoptic FPN, with semantic logits
        found = found[0]
    if not isinstance(model, MmdetRCNN):
        found = [image[image.pred_boxes.nonempty()] for image in found]
    return [_arrays(image) for image in found]


def _arrays(instances: Instances) -> Arrays:
    result = {
        "boxes": instances.pred_boxes.tensor.numpy(),
        "scores": instances.scores.numpy(),
        "classes": instances.pred_classes.numpy(),
    }
    if instances.has("pred_masks"):
        result["masks"] = instances.pred_masks[:, 0].numpy()
    return result


def _rows_of(results: Arrays, image: int) -> Arrays:
    exist = results["classes"][image] >= 0
    names = ("boxes", "scores", "classes", "masks")
    return {name: results[name][image][exist] for name in names if name in results}


def _compare_detections(expected: Arrays, actual: Arrays) -> dict[str, float]:
    """Compare two sets of detections of one image.

    The order of equal scores is open, so each detection is compared with its counterpart.
    """
    count, found = len(expected["scores"]), len(actual["scores"])
    if count != found:
        return {"numbers of detections": float(abs(count - found))}
    if not count:
        return {}
    cost = np.abs(expected["boxes"][:, None] - actual["boxes"][None]).max(axis=-1)
    cost = cost + 1e3 * np.abs(expected["scores"][:, None] - actual["scores"][None])
    cost = cost + 1e6 * (expected["classes"][:, None] != actual["classes"][None])
    rows, columns = linear_sum_assignment(cost)
    result = {}
    for name, value in expected.items():
        difference = np.abs(value[rows].astype(np.float64) - actual[name][columns])
        result[name] = float(difference.max())
    return result
