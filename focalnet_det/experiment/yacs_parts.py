"""Build the parts of a run from a yacs config: model, optimizer, loaders."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import build_model as build_detectron2_model
from detectron2.solver import build_optimizer as build_detectron2_optimizer

from ..data.augmentation import AUGMENTATIONS, evaluation_resize
from ..data.loader import TrainLoader
from ..data.loader import build_test_loader as build_loader_of_tests
from ..data.loader import build_test_mapper as build_mapper_of_tests
from ..data.loader import build_train_loader as build_loader
from ..data.semantic.semantic_crops import semantic_crops, shortest_edge_crops

# Registers them as MODEL.META_ARCHITECTURE.
from ..heads import atss, dino, mask2former, reppoints_v2  # noqa: F401
from ..heads.mmdet.conventions import MmdetRetinaNet, MmdetROIHeads, MmdetRPN
from ..heads.mmdet.rcnn import MmdetRCNN
from .solver import adamw

# Value of INPUT.POLICY that uses INPUT.SEMANTIC_CROPS.
SEMANTIC_CROPS = "semantic_crops"
SHORTEST_EDGE_CROPS = "shortest_edge_crops"
# Registered name in Detectron2 -> replacement with mmdet's conventions.
MMDET_PARTS = {"RPN": MmdetRPN, "StandardROIHeads": MmdetROIHeads}
MMDET_MODELS = {"GeneralizedRCNN": MmdetRCNN, "RetinaNet": MmdetRetinaNet}
FLIPS = ("horizontal", "vertical", "none")


def build_model(cfg: CfgNode) -> Any:
    """Build the model of a config on the CPU.

    Raises: ValueError for unknown ``MODEL.CONVENTIONS``.
    """
    return build_detectron2_model(model_config(cfg, "cpu"))


def model_config(cfg: CfgNode, device: str) -> CfgNode:
    """Return a config from which Detectron2 builds the model on a device.

    Raises: ValueError for unknown ``MODEL.CONVENTIONS``.
    """
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = device
    apply_conventions(cfg)
    return cfg


def apply_conventions(cfg: CfgNode) -> None:
    """Replace the names of modules as ``MODEL.CONVENTIONS`` says, in place.

    Raises: ValueError for an unknown value.
    """
    if cfg.MODEL.CONVENTIONS not in ("detectron2", "mmdet"):
        raise ValueError(
            f"Unknown MODEL.CONVENTIONS {cfg.MODEL.CONVENTIONS!r}. Known: detectron2, mmdet."
        )
    if cfg.MODEL.CONVENTIONS == "mmdet":
        for node in (cfg.MODEL.PROPOSAL_GENERATOR, cfg.MODEL.ROI_HEADS):
            if node.NAME in MMDET_PARTS:
                node.NAME = MMDET_PARTS[node.NAME].__name__
        if cfg.MODEL.META_ARCHITECTURE in MMDET_MODELS:
            name = MMDET_MODELS[cfg.MODEL.META_ARCHITECTURE].__name__
            cfg.MODEL.META_ARCHITECTURE = name


def build_optimizer(cfg: CfgNode, model: Any) -> Any:
    """Build the optimizer of a config for a model.

    Raises: ValueError for an unknown ``SOLVER.OPTIMIZER``.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER == "SGD":
        return build_detectron2_optimizer(cfg, model)
    if solver.OPTIMIZER == "ADAMW":
        factor = solver.BACKBONE_MULTIPLIER
        # In Detectron2 the FPN is part of the backbone, but it is not pretrained.
        inner = any(name.startswith("backbone.bottom_up.") for name, _ in model.named_parameters())
        part = "backbone.bottom_up." if inner else "backbone."
        return adamw(
            model,
            lr=solver.BASE_LR,
            weight_decay=solver.WEIGHT_DECAY,
            no_decay_names=solver.NO_DECAY_NAMES,
            lr_factors={} if factor == 1 else {part: factor},
            layer_decay=solver.LAYER_DECAY,
        )
    raise ValueError(f"Unknown SOLVER.OPTIMIZER {solver.OPTIMIZER!r}. Known: ADAMW, SGD.")


def augmentations(node: CfgNode) -> list[Any]:
    """Build the training augmentation of a config's ``INPUT``.

    Raises: ValueError for an unknown policy.
    """
    if node.POLICY == SEMANTIC_CROPS:
        fields = {key.lower(): value for key, value in node.SEMANTIC_CROPS.items()}
        if node.FORMAT != "RGB":
            fields["channels"] = node.FORMAT
        return semantic_crops(**fields)
    if node.POLICY == SHORTEST_EDGE_CROPS:
        crops = node.SEMANTIC_CROPS
        return shortest_edge_crops(
            crop=crops.CROP,
            max_long_side=crops.LONG_SIDE,
            photometric=crops.PHOTOMETRIC,
            **({} if node.FORMAT == "RGB" else {"channels": node.FORMAT}),
        )
    if node.POLICY not in AUGMENTATIONS:
        known = ", ".join([*AUGMENTATIONS, SEMANTIC_CROPS, SHORTEST_EDGE_CROPS])
        raise ValueError(f"Unknown INPUT.POLICY {node.POLICY!r}. Known: {known}.")
    return AUGMENTATIONS[node.POLICY](
        short_sides=node.MIN_SIZE_TRAIN,
        max_long_side=node.MAX_SIZE_TRAIN,
        antialias=node.ANTIALIAS,
    )


def apply_flip_option(steps: list[Any], flip: str) -> list[Any]:
    """Return augmentations with the flip that ``INPUT.RANDOM_FLIP`` selects.

    Raises: ValueError for an unknown value.
    """
    if flip not in FLIPS:
        raise ValueError(f"Unknown INPUT.RANDOM_FLIP {flip!r}. Known: {', '.join(FLIPS)}.")
    if flip == "horizontal":
        return steps
    others = [step for step in steps if not isinstance(step, T.RandomFlip)]
    return others if flip == "none" else [T.RandomFlip(horizontal=False, vertical=True), *others]


def train_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Return the arguments of the loader of a config's training sets.

    Raises: ValueError for masks as polygons, and as :func:`augmentations`.
    """
    # Only bitmaps are cropped exactly. "polygon" is an error only if the user has set it, because
    # it is Detectron2's default.
    if cfg.INPUT.MASK_FORMAT != "bitmask" and "INPUT.MASK_FORMAT" in cfg.GIVEN_KEYS:
        raise ValueError("INPUT.MASK_FORMAT must be bitmask: masks are always trained as bitmaps.")
    return {
        "datasets": cfg.DATASETS.TRAIN,
        "augmentations": apply_flip_option(augmentations(cfg.INPUT), cfg.INPUT.RANDOM_FLIP),
        "batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "masks": cfg.MODEL.MASK_ON,
        "keypoints": cfg.MODEL.KEYPOINT_ON,
        "image_format": cfg.INPUT.FORMAT,
        "filter_empty": cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
    }


def build_train_loader(cfg: CfgNode) -> TrainLoader:
    """Build the loader of a config's training sets."""
    return build_loader(**train_arguments(cfg))


def test_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Return the arguments of the loader of a config's test sets, without the name of the set."""
    test_time, node = cfg.TEST.AUG, cfg.INPUT

    def resize(short_side: int, max_long_side: int) -> list[Any]:
        return evaluation_resize(
            short_side=short_side, max_long_side=max_long_side, antialias=node.ANTIALIAS
        )

    sides = test_time.MIN_SIZES if test_time.ENABLED else ()
    return {
        "augmentations": resize(node.MIN_SIZE_TEST, node.MAX_SIZE_TEST),
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "image_format": node.FORMAT,
        "views": [resize(side, test_time.MAX_SIZE) for side in sides],
        "flip": test_time.ENABLED and test_time.FLIP,
    }


def build_test_loader(cfg: CfgNode, name: str) -> Any:
    """Build the loader of one of a config's test sets."""
    return build_loader_of_tests(dataset=name, **test_arguments(cfg))


def build_test_mapper(cfg: CfgNode) -> Any:
    """Build what turns an image into the model's input as the test loaders would."""
    arguments = test_arguments(cfg)
    del arguments["num_workers"]
    return build_mapper_of_tests(**arguments)
