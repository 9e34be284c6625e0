"""Every yacs key of this package, in one place."""

from detectron2.config import CfgNode

from .backbones.d2 import add_backbone_config
from .heads import segmentor, upernet  # noqa: F401  (they register themselves)


def add_focalnet_config(cfg: CfgNode) -> None:
    """Adds this package's keys to a Detectron2 config; see the function in ``focalnet_det``."""
    add_backbone_config(cfg)

    # The rest is read by tools/train_net.py alone. "SGD" as in Detectron2, or "ADAMW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # With ADAMW: parameters with one of these in their name are exempt from weight decay.
    cfg.SOLVER.NO_DECAY_NAMES = ("norm",)
    # With ADAMW: factor on the rate of the backbone, and per block from the last to the stem.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    cfg.SOLVER.LAYER_DECAY = 1.0
    # What the fields of the same names in focalnet_det.experiment.TrainOptions say.
    cfg.SOLVER.RECIPE_BATCH = 0
    cfg.SOLVER.INIT_LEVELS = ""
    cfg.SOLVER.GROWTH_ITERATIONS = 10_000
    cfg.SOLVER.ACCUMULATION = 1
    cfg.SOLVER.EMA_DECAY = 0.0
    cfg.SOLVER.KEEP_CHECKPOINTS = 3
    cfg.SOLVER.KEEP_BEST = ""
    cfg.SOLVER.LOG_ITERATIONS = 20
    # Length in epochs of the training set, with decay at EPOCH_STEPS; 0 reads MAX_ITER and STEPS.
    cfg.SOLVER.EPOCHS = 0
    cfg.SOLVER.EPOCH_STEPS = ()
    # "fp32", "bf16" or "fp16"; SOLVER.AMP.ENABLED means fp16 where this is left at "fp32".
    cfg.SOLVER.PRECISION = "fp32"
    # A name in focalnet_det.data.augmentation.POLICIES, or "semantic_crops", with these arguments.
    cfg.INPUT.POLICY = "resize"
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
    # "detectron2", or "mmdet", with which the published results were made: MmdetRPN, MmdetROIHeads
    # and MmdetRCNN stand in for RPN, StandardROIHeads and GeneralizedRCNN, and
    # MmdetRetinaNet for RetinaNet.
    cfg.MODEL.CONVENTIONS = "detectron2"
    # UPerNetHead's own and its loss's, see PixelCrossEntropy; the rest comes from
    # MODEL.SEM_SEG_HEAD. Empty or 0 switches an option off.
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
    # MmsegSegmentor's: (height, width) in pixels; empty for none.
    cfg.MODEL.SEGMENTOR = CfgNode({"TRAIN_SIZE": (), "WINDOW": (), "WINDOW_STRIDE": ()})
    # Predictions per image that enter box and mask AP.
    cfg.TEST.MAX_DETS = 100
    # Test images that are drawn at the end.
    cfg.TEST.PICTURES = 6
    # Boundary AP beside mask AP.
    cfg.TEST.BOUNDARY_AP = False
    # An HTML page per test set after the last evaluation.
    cfg.TEST.REPORT = False
