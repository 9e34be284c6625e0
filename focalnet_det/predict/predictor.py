"""Predict with a trained model, given nothing but the folder of its run."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from detectron2.data import Metadata
from numpy.typing import NDArray
from PIL import Image

from ..data.io.read_image import read_rgb, to_upright_rgb
from ..engine.precision import autocast
from ..heads.tta import TestTimeAugmentation
from .prediction import Prediction
from .trained_model import load_trained

# A file, an RGB array (H, W, 3) or gray one (H, W) of uint8, or a picture of Pillow.
ImageLike = str | Path | NDArray[np.uint8] | Image.Image

# Not any sequence: a string is one, too.
Images = (
    list[str] | list[Path] | list[NDArray[np.uint8]] | list[Image.Image] | tuple[ImageLike, ...]
)


class Predictor:
    """A trained model that takes images as they come.

    Images are prepared as in the evaluation of the run: size, channel order, pixel statistics,
    views of test-time augmentation and precision are those of its config. For the images of its
    test set it predicts what the evaluation scored.

    Example::

        predictor = Predictor("output/mine")
        prediction = predictor("image.jpg")
        print(prediction.names, prediction.instances.scores)
        Image.fromarray(prediction.draw()).save("drawn.png")

    Args:
        source: folder of a run, whose best weights are used, or a checkpoint.
        config: of checkpoints that do not hold theirs: the config file of the training.
        device: of PyTorch; None for a GPU if there is one.
        threshold: least score of the instances that are returned, 0..1. The model has a threshold
            of its own, which is low.
    Raises: ValueError if there is no checkpoint, it has no config, or they do not fit together.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        config: str | Path | None = None,
        device: str | None = None,
        threshold: float = 0.0,
    ) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be from 0 to 1, not {threshold}.")
        trained = load_trained(source, config=config, device=device)
        self.model = trained.model
        self.metadata: Metadata = trained.metadata
        self.checkpoint = trained.path
        self.threshold = threshold
        self._options = trained.experiment.options
        self._mapper = trained.experiment.test_mapper()
        # A mapper of the user's own may not say.
        self.image_format: str = getattr(self._mapper, "image_format", "RGB")
        self._augmented = TestTimeAugmentation(trained.model)

    @overload
    def __call__(self, images: ImageLike) -> Prediction: ...

    @overload
    def __call__(self, images: Images) -> list[Prediction]: ...

    def __call__(self, images: ImageLike | Images) -> Prediction | list[Prediction]:
        """Predict for one image, or for each of a list.

        Neighbors of one size in a list are computed as one batch.

        Args:
            images: paths, RGB arrays (H, W, 3) or gray ones (H, W) of uint8, pictures of Pillow.
        Raises: OSError for a file that cannot be read, ValueError for an array of another kind.
        """
        if isinstance(images, str | Path | np.ndarray | Image.Image):
            return self((images,))[0]
        given: list[ImageLike] = list(images)
        pictures = [to_picture(image) for image in given]
        inputs = [self.prepare(picture) for picture in pictures]
        outputs = list(self._outputs(inputs))
        return [
            Prediction(
                output,
                picture,
                self.metadata,
                threshold=self.threshold,
                source=str(image) if isinstance(image, str | Path) else "",
            )
            for output, picture, image in zip(outputs, pictures, given, strict=True)
        ]

    def prepare(self, picture: Image.Image) -> dict[str, Any]:
        """Return the model's input for an upright RGB picture, see :func:`to_picture`."""
        size = {"height": picture.height, "width": picture.width}
        return self._mapper({"picture": picture, **size})

    def _outputs(self, inputs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        # Images of other sizes would be padded, which changes what most models predict.
        for _, group in groupby(inputs, key=_size):
            with torch.inference_mode(), autocast(self._options):
                batch = list(group)
                if "image" in batch[0]:
                    yield from self.model(batch)
                else:
                    yield from self._augmented(batch)


def to_picture(image: ImageLike) -> Image.Image:
    """Return an image as an upright RGB picture.

    Raises: OSError for a file that cannot be read, ValueError for an array that is not
        (H, W, 3) or (H, W) of uint8.
    """
    if isinstance(image, str | Path):
        return read_rgb(image)[0]
    if isinstance(image, Image.Image):
        return to_upright_rgb(image)[0]
    array = np.asarray(image)
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not is_image or not array.size:
        raise ValueError(
            f"An array of shape {array.shape} and type {array.dtype} is no image: give uint8, "
            "(height, width, 3) in RGB or (height, width) in gray."
        )
    return Image.fromarray(array).convert("RGB")


def _size(record: dict[str, Any]) -> Any:
    # With views, each image is computed on its own.
    return tuple(record["image"].shape) if "image" in record else id(record)
