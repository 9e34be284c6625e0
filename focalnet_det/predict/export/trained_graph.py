"""Export what a run or a checkpoint holds, with its class names and image sizes in the file."""

from pathlib import Path
from typing import Any

from detectron2.data import transforms as T
from torch import nn

from ...create import create_backbone
from ..trained_model import TrainedModel, load_trained
from .write_graph import ExportReport, export_model

Size = tuple[int, int]


def export_trained(
    source: str | Path,
    path: str | Path,
    *,
    config: str | Path | None = None,
    backbone_only: bool = False,
    size: Size = (320, 416),
) -> ExportReport:
    """Write the model of a run or a checkpoint, see :func:`~.write_graph.export_model`.

    Args:
        source: folder of a run, whose best weights are used, or a checkpoint.
        path: ``.onnx``, or ``.pt2`` for ``torch.export``.
        config: of checkpoints that do not hold theirs.
        backbone_only: leave out neck and head.
        size: (height, width) of the images that are recorded and compared first, pixels.
    Raises: ValueError as :func:`~focalnet_det.predict.trained_model.load_trained` and
        ``export_model``.
    """
    trained = load_trained(source, config=config, device="cpu")
    model: nn.Module = trained.model
    if backbone_only:
        backbone = model.get_submodule("backbone")
        model = getattr(backbone, "bottom_up", backbone)
    return export_model(model, path, description=describe_model(trained), size=size)


def export_backbone(
    variant: str, path: str | Path, *, weights: str | Path | None = None, size: Size = (320, 416)
) -> ExportReport:
    """Write a backbone by name, see :func:`~.write_graph.export_model`.

    Args:
        variant, weights: as in :func:`focalnet_det.create_backbone`.
        path, size: as above.
    """
    net = create_backbone(variant, weights=weights)
    return export_model(net.eval(), path, description={"variant": variant}, size=size)


def describe_model(trained: TrainedModel) -> dict[str, Any]:
    """Return what a user of an exported model needs to know: class names and image sizes."""
    about: dict[str, Any] = {"checkpoint": trained.path.name}
    for key in ("thing_classes", "stuff_classes"):
        if names := trained.metadata.get(key, None):
            about[key] = list(names)
    augmentations = getattr(trained.experiment.test_mapper(), "augmentations", None)
    for step in getattr(augmentations, "augs", None) or ():
        if isinstance(step, T.ResizeShortestEdge):
            about["short_side"] = step.short_edge_length[0]
            about["max_long_side"] = step.max_size
    return about
