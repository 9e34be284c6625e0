"""R-CNN that hands boxes back to the original image as mmdet does."""

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import Instances, ROIMasks


@META_ARCH_REGISTRY.register()
class MmdetRCNN(GeneralizedRCNN):
    """Detectron2's R-CNN without the clip in the original image, and with empty boxes kept.

    Boxes are clipped in the resized image by both libraries, so that a second clip changes
    rounding only; a box without area is a false positive that Detectron2 leaves out.
    Source: mmdet 2.11:mmdet/models/roi_heads/bbox_heads/bbox_head.py (get_bboxes).
    """

    def inference(
        self,
        batched_inputs: Sequence[Mapping[str, Any]],
        detected_instances: Sequence[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> Any:
        """Return the instances of each image, in the original one if they are postprocessed."""
        results = super().inference(batched_inputs, detected_instances, do_postprocess=False)
        if not do_postprocess:
            return results
        sizes = [(r.get("height"), r.get("width")) for r in batched_inputs]
        return [
            {"instances": in_original_image(found, height, width)}
            for found, (height, width) in zip(results, sizes, strict=True)
        ]


def in_original_image(
    results: Instances, height: int | None, width: int | None, mask_threshold: float = 0.5
) -> Instances:
    """Scale boxes and paste masks.

    Args:
        results: in the resized image; ``pred_masks`` are (N, 1, M, M) probabilities.
        height, width: of the original image, pixels; None for those of the resized one.
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
