"""Check that the parts of a model fit each other and the classes of the data."""

from detectron2.data import MetadataCatalog
from detectron2.modeling import Backbone
from omegaconf import ListConfig
from torch import nn

from ..backbones.stages import StagedBackbone
from ..heads.empty import EMPTY_SAFE
from .data_settings import KIND_OF_EVALUATOR
from .settings import Settings

# Attributes of heads that name features of the backbone.
FEATURES = (
    "in_features",
    "box_in_features",
    "mask_in_features",
    "keypoint_in_features",
    "head_in_features",
)


def class_problems(settings: Settings, model: nn.Module) -> list[str]:
    """Describe differing class counts of model and data, and class weights that are all zero."""
    found = []
    weights, classes = settings.model.class_weights, settings.model.classes
    if weights is not None and not any(weights):
        found.append("All class weights are 0: there is nothing to learn.")
    for name in (*settings.train_sets, *settings.test_sets):
        metadata = MetadataCatalog.get(name)
        kind = KIND_OF_EVALUATOR.get(metadata.get("evaluator_type", ""))
        names = metadata.get("stuff_classes" if kind == "labels" else "thing_classes")
        if kind == "panoptic" and hasattr(model, "roi_heads"):
            ids = metadata.get("thing_dataset_id_to_contiguous_id") or names or ()
            names = list(names or ())[: len(ids)] if names else None
        if names is not None and classes is not None and len(names) > classes:
            found.append(
                f"Data set {name} has {len(names)} classes, the model {classes}: set num_classes "
                f"to {len(names)}."
            )
    return found


def channel_problems(model: nn.Module) -> list[str]:
    """Describe a backbone that does not accept images of three channels, which data sets have."""
    networks = [module for module in model.modules() if isinstance(module, StagedBackbone)]
    return [
        f"The backbone expects {network.patch_embed.proj.in_channels} image channels, but images "
        "are read as RGB or BGR: set in_channels to 3."
        for network in networks
        if network.patch_embed.proj.in_channels != 3
    ]


def feature_problems(model: nn.Module) -> list[str]:
    """Describe features that heads read and the backbone does not return."""
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, Backbone):
        return []
    available, inside = set(backbone.output_shape()), set(backbone.modules())
    found = []
    for module in set(model.modules()) - inside:
        for attribute in FEATURES:
            names = getattr(module, attribute, None)
            if isinstance(names, list | tuple | ListConfig) and not set(names) <= available:
                missing = ", ".join(map(str, sorted(set(names) - available, key=str)))
                found.append(
                    f"{_configured_name(module)} reads features {missing}, but the backbone "
                    f"returns {', '.join(sorted(available))}: change {attribute}."
                )
    return sorted(found)


def _configured_name(module: nn.Module) -> str:
    """Return the name of the class in the config, also if the model has a replacement of it."""
    replacements = EMPTY_SAFE.values()
    return next(c.__name__ for c in type(module).__mro__ if c not in replacements)
