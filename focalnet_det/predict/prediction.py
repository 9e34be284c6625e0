"""Hold the predictions of a model for one image, with the names of its classes."""

from typing import Any

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..visualization.draw_classes import NEUTRAL, masked_image_panels, titled
from ..visualization.draw_instances import draw_instances
from ..visualization.draw_panoptic import draw_segments
from ..visualization.draw_semantic import draw_classes, palette

BEST_CLASSES = 5


class Prediction(dict[str, Any]):
    """The output of a Detectron2 model for one image, on the CPU.

    It is the model's own dict: "instances" (``Instances`` at the image's size), "sem_seg" (scores,
    (K, H, W)), "panoptic_seg" (segment ids, (H, W), and a list of dicts, with "name"),
    "class_scores" (logits, (K,)) or "masked_image", as far as the model predicts them.

    Attributes:
        image: (H, W, 3), uint8, RGB.
        metadata: of the classes.
        source: file of the image, "" if it was given as an array.
    """

    def __init__(
        self,
        output: dict[str, Any],
        image: Image.Image,
        metadata: Metadata,
        *,
        threshold: float = 0.0,
        source: str = "",
    ) -> None:
        super().__init__(output)
        self.image: NDArray[np.uint8] = np.asarray(image)
        self.metadata = metadata
        self.source = source
        if "instances" in output:
            instances = output["instances"].to("cpu")
            self["instances"] = instances[instances.scores >= threshold]
        if "sem_seg" in output:
            self["sem_seg"] = output["sem_seg"].cpu()
        if "panoptic_seg" in output:
            ids, segments = output["panoptic_seg"]
            self["panoptic_seg"] = (ids.cpu(), [self._named(segment) for segment in segments])
        if "class_scores" in output:
            self["class_scores"] = output["class_scores"].float().cpu()

    def _named(self, segment: dict[str, Any]) -> dict[str, Any]:
        kind = "thing" if segment["isthing"] else "stuff"
        return {**segment, "name": self.metadata.get(f"{kind}_classes")[segment["category_id"]]}

    @property
    def instances(self) -> Instances:
        """Return the instances. Raises: KeyError if the model predicts none."""
        return self._get("instances")

    @property
    def names(self) -> list[str]:
        """Return the class name of each instance. Raises: KeyError as above."""
        classes = self.metadata.thing_classes
        return [classes[index] for index in self.instances.pred_classes.tolist()]

    @property
    def semantic(self) -> Tensor:
        """Return the class of each pixel, (H, W), int64. Raises: KeyError as above."""
        scores: Tensor = self._get("sem_seg")
        return scores.argmax(dim=0)

    @property
    def panoptic(self) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return segment ids, (H, W), 0 for none, and the segments. Raises: KeyError as above."""
        segments: tuple[Tensor, list[dict[str, Any]]] = self._get("panoptic_seg")
        return segments

    @property
    def classes(self) -> list[tuple[str, float]]:
        """Return the names and probabilities of the five most probable classes of the image.

        Raises: KeyError as above.
        """
        scores: Tensor = self._get("class_scores")
        names = self.metadata.thing_classes
        best = scores[: len(names)].softmax(dim=0).topk(min(BEST_CLASSES, len(names)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [(names[index], probability) for index, probability in pairs]

    def _get(self, key: str) -> Any:
        if key not in self:
            raise KeyError(f"The model predicts no {key!r}; it predicts {', '.join(self)}.")
        return self[key]

    def draw(self, *, min_score: float = 0.5) -> NDArray[np.uint8]:
        """Draw the prediction on the image.

        Panoptic segments if the model predicts them, else instances, else classes of pixels; of a
        classifier, its best classes below; of a pretraining, the masked and the whole image.

        Args:
            min_score: of the instances that are drawn.
        Returns: (h, w, 3), uint8, RGB; larger than the image where that is small.
        """
        if "panoptic_seg" in self:
            ids, segments = self.panoptic
            return draw_segments(self.image, ids.numpy(), segments, self.metadata)
        if "instances" in self:
            return draw_instances(self.image, self.instances, self.metadata, min_score=min_score)
        if "class_scores" in self:
            return titled(self.image, [f"{name} {p:.0%}" for name, p in self.classes[:3]], NEUTRAL)
        if "masked_image" in self:
            pictures = [picture for _, picture in masked_image_panels(self)]
            return np.ascontiguousarray(np.concatenate(pictures, axis=1))
        names = self.metadata.stuff_classes
        colors = self.metadata.get("stuff_colors") or palette(len(names))
        return draw_classes(self.image, self.semantic.numpy(), names, colors)
