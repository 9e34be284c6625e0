"""Define an R-CNN that rescales predictions to the original image as mmdet does."""

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import Instances, ROIMasks


@META_ARCH_REGISTRY.register()
class MmdetRCNN(GeneralizedRCNN):
    """Detectron2's R-CNN that neither clips boxes to the original image nor removes empty ones.

    Both libraries clip boxes to the resized image, so a second clip changes only their rounding. An
    empty box is a false positive, which Detectron2 removes and mmdet does not.
    Source: mmdet 2.11:mmdet/models/roi_heads/bbox_heads/bbox_head.py (get_bboxes).
    """

    def inference(
        self,
        batched_inputs: Sequence[Mapping[str, Any]],
        detected_instances: Sequence[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> Any:
        """Predict the instances of each image, in the original image if ``do_postprocess``."""
        results = super().inference(batched_inputs, detected_instances, do_postprocess=False)
        if not do_postprocess:
            return results
        sizes = [(r.get("height"), r.get("width")) for r in batched_inputs]
        return [
            {"instances": rescale_to_original(instances, height, width)}
            for instances, (height, width) in zip(results, sizes, strict=True)
        ]


def rescale_to_original(
    results: Instances, height: int | None, width: int | None, mask_threshold: float = 0.5
) -> Instances:
    """Rescale boxes and keypoints to the original image, and paste masks into it.

    Args:
        results: instances of the resized image: boxes xyxy, absolute pixels; ``pred_masks``
            (N, 1, M, M), probabilities; ``pred_keypoints`` (N, K, 3: x, y, score).
        height, width: size of the original image, pixels; None for that of the resized one.
        mask_threshold: smallest probability of the pixels of a mask.
    """
    size = (height or results.image_size[0], width or results.image_size[1])
    scaled = Instances(size, **results.get_fields())
    scale_y, scale_x = (new / old for new, old in zip(size, results.image_size, strict=True))
    scaled.pred_boxes = results.pred_boxes.clone()
    scaled.pred_boxes.scale(scale_x, scale_y)
    if scaled.has("pred_masks"):
        masks = ROIMasks(scaled.pred_masks[:, 0])
        scaled.pred_masks = masks.to_bitmasks(scaled.pred_boxes, *size, mask_threshold).tensor
    if scaled.has("pred_keypoints"):
        factors = scaled.pred_keypoints.new_tensor([scale_x, scale_y, 1.0])
        scaled.pred_keypoints = scaled.pred_keypoints * factors
    return scaled
