"""Define the yacs keys of this package."""

from detectron2.config import CfgNode

from ..detectron2.backbone import add_backbone_config
from .options import own_yacs_options


def add_focalnet_config(cfg: CfgNode) -> None:
    """Add this package's keys to a Detectron2 config; see the function in ``focalnet_det``."""
    add_backbone_config(cfg)

    # Only tools/train_net.py reads the following keys. "SGD" as in Detectron2, or "ADAMW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # With ADAMW: parameters with one of these in their name are not decayed.
    cfg.SOLVER.NO_DECAY_NAMES = ("norm",)
    # With ADAMW: factor on the learning rate of the backbone, and per block from last to first.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    cfg.SOLVER.LAYER_DECAY = 1.0
    # Options of the run: SOLVER.<NAME> or TEST.<NAME>, see docs/configs.md.
    for key, default in own_yacs_options().items():
        section, name = key.split(".")
        cfg[section][name] = (
            CfgNode(default, new_allowed=True) if isinstance(default, dict) else default
        )
    # Of the decay of WarmupPolyLR; 1 is linear.
    cfg.SOLVER.POLY_POWER = 1.0
    # Length in epochs of the training set, with decay at EPOCH_STEPS; 0 reads MAX_ITER and STEPS.
    cfg.SOLVER.EPOCHS = 0
    cfg.SOLVER.EPOCH_STEPS = ()
    add_input_keys(cfg)
    add_model_keys(cfg)
    add_set_prediction_keys(cfg)
    add_dense_detector_keys(cfg)
    # The user's own data sets, in the config that a run saves.
    cfg.OWN_DATA = CfgNode(new_allowed=True)
    # Keys that the config file and the command line set; it is an error if nothing reads one.
    cfg.GIVEN_KEYS = []


def add_input_keys(cfg: CfgNode) -> None:
    """Add the keys of augmentation."""
    # A name in AUGMENTATIONS of focalnet_det.data.augmentation, or "semantic_crops" with these
    # arguments.
    cfg.INPUT.POLICY = "resize"
    # "shortest_edge_crops" takes CROP, LONG_SIDE and PHOTOMETRIC alone.
    cfg.INPUT.SEMANTIC_CROPS = CfgNode(
        {
            "CROP": 512,
            "SHORT_SIDE": 512,
            "LONG_SIDE": 2048,
            "RATIOS": (0.5, 2.0),
            "PHOTOMETRIC": True,
        }
    )
    # False resizes as mmdet does: without antialiasing where images shrink.
    cfg.INPUT.ANTIALIAS = True


def add_model_keys(cfg: CfgNode) -> None:
    """Add the keys of heads and conventions."""
    # "detectron2", or "mmdet" as in the published results: MmdetRPN, MmdetROIHeads, MmdetRCNN and
    # MmdetRetinaNet then replace RPN, StandardROIHeads, GeneralizedRCNN and RetinaNet.
    cfg.MODEL.CONVENTIONS = "detectron2"
    # Options of UPerNetHead and PixelCrossEntropy that MODEL.SEM_SEG_HEAD does not have. Empty or 0
    # disables an option.
    cfg.MODEL.UPERNET = CfgNode(
        {
            "DROPOUT": 0.1,
            "AUXILIARY_WEIGHT": 0.4,
            "AUXILIARY_CHANNELS": 256,
            "LOSS_AVERAGE": "all",
            "CLASS_WEIGHTS": (),
            "OHEM_THRESHOLD": 0.0,
            "OHEM_MIN_KEPT": 100_000,
        }
    )
    # Options of Mask2Former; classes and features come from MODEL.SEM_SEG_HEAD.
    cfg.MODEL.MASK2FORMER = CfgNode(
        {
            "TASKS": ("semantic",),
            "QUERIES": 100,
            "CHANNELS": 256,
            "ENCODER_LAYERS": 6,
            "DECODER_LAYERS": 9,
            "POINTS": 12_544,
            "TRAIN_SIZE": (),
            "CLASS_WEIGHT": 2.0,
            "MASK_WEIGHT": 5.0,
            "DICE_WEIGHT": 5.0,
            "NO_OBJECT_WEIGHT": 0.1,
            "OBJECT_THRESHOLD": 0.8,
            "OVERLAP_THRESHOLD": 0.8,
            "IGNORE_UNLABELED": False,
            "MASK_PADDING": False,
        }
    )
    # Sizes of MmsegSegmentor: (height, width), pixels; empty for none.
    cfg.MODEL.SEGMENTOR = CfgNode({"TRAIN_SIZE": (), "WINDOW": (), "WINDOW_STRIDE": ()})


def add_dense_detector_keys(cfg: CfgNode) -> None:
    """Add the keys of ATSS and RepPoints v2; the rest comes from ``MODEL.RETINANET``."""
    # Candidates of an object on each level, and the factor of the box loss.
    cfg.MODEL.ATSS = CfgNode({"TOPK": 9, "BOX_LOSS_WEIGHT": 2.0})
    # Candidates likewise, and the size of the head.
    cfg.MODEL.REPPOINTS_V2 = CfgNode(
        {"TOPK": 9, "CONVS": 3, "SHARED_CONVS": 1, "CORNER_CHANNELS": 64}
    )


def add_set_prediction_keys(cfg: CfgNode) -> None:
    """Add the keys of detectors that predict a set of boxes."""
    # Sparse R-CNN's, see focalnet_det.heads.sparse_rcnn; classes, levels and RoIAlign come from
    # MODEL.ROI_HEADS and MODEL.ROI_BOX_HEAD.
    cfg.MODEL.SPARSE_RCNN = CfgNode(
        {
            "PROPOSALS": 300,
            "INITIAL_BOX": "image",
            "STAGES": 6,
            "DYNAMIC_CHANNELS": 64,
            "FEEDFORWARD": 2048,
            "HEADS": 8,
            "CLASS_WEIGHT": 2.0,
            "L1_WEIGHT": 5.0,
            "GIOU_WEIGHT": 2.0,
        }
    )
    # DINO's, see the class. No IN_FEATURES are all of the backbone's.
    cfg.MODEL.DINO = CfgNode(
        {
            "NUM_CLASSES": 80,
            "COCO_IDS": False,
            "IN_FEATURES": (),
            "SCALES": 4,
            "CONVENTIONS": "auto",
            "QUERIES": 900,
            "CHANNELS": 256,
            "ENCODER_LAYERS": 6,
            "DECODER_LAYERS": 6,
            "FEEDFORWARD": 2048,
            "DENOISING_QUERIES": 100,
            "LABEL_NOISE": 0.25,
        }
    )
