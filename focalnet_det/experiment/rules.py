"""Define the ranges of numbers in configs, by the name of the argument."""

from .values import AT_LEAST_0, AT_LEAST_1, POSITIVE, SHARE, Range

PIXELS = Range(1, 100_000)
BELOW_1 = Range(0, 0.999)

RULES: dict[str, Range] = {
    # Data.
    "batch_size": Range(1, 100_000),
    "num_workers": Range(0, 256),
    **dict.fromkeys(
        ("crop", "short_side", "short_sides", "max_long_side", "long_side", "size", "crop_range",
         "crop_short_sides", "window", "window_stride"),
        PIXELS,
    ),
    "train_size": Range(0, 100_000),
    "ratios": POSITIVE,
    "scale": POSITIVE,
    "scales": POSITIVE,
    "copy_paste": SHARE,
    "largest_share": SHARE,
    # Optimizer and schedule.
    "lr": POSITIVE,
    "weight_decay": AT_LEAST_0,
    "layer_decay": Range(0, 1, above=True),
    "lr_factors": AT_LEAST_0,
    "gamma": Range(0, 1, above=True),
    "warmup_iterations": AT_LEAST_0,
    "warmup_factor": SHARE,
    "final_factor": SHARE,
    "milestones": POSITIVE,
    "epochs": POSITIVE,
    "iterations": AT_LEAST_1,
    # Model.
    "in_channels": Range(1, 1024),
    "embed_dim": Range(1, 8192),
    "depths": Range(1, 1000),
    "mlp_ratio": Range(0, 64, above=True),
    "focal_levels": Range(0, 32),
    "focal_windows": Range(1, 63),
    "num_heads": AT_LEAST_1,
    "window_size": Range(3, 63),
    "expand_size": Range(0, 31),
    "top_k": AT_LEAST_1,
    "layer_scale": POSITIVE,
    "drop_rate": BELOW_1,
    "drop_path_rate": BELOW_1,
    "frozen_stages": AT_LEAST_0,
    "patch_size": Range(1, 64),
    "stem_padding": Range(0, 64),
    **dict.fromkeys(
        ("channels", "corner_channels", "auxiliary_channels", "out_channels", "num_classes",
         "num_keypoints", "conv_dims", "fc_dims"),
        Range(1, 100_000),
    ),
    "dropout": BELOW_1,
    **dict.fromkeys(("label_smoothing", "erasing", "mix_probability", "flip_probability"), SHARE),
    **dict.fromkeys(("mixup", "cutmix", "color_jitter"), AT_LEAST_0),
    "mask_unit": AT_LEAST_1,
    "mask_ratio": Range(0, 1, above=True),
    "class_weights": AT_LEAST_0,
    "ohem_threshold": SHARE,
    "ohem_min_kept": AT_LEAST_0,
    "loss_weight": AT_LEAST_0,
    "box_loss_weight": AT_LEAST_0,
    "topk": AT_LEAST_1,
    "auxiliary_weight": AT_LEAST_0,
    "batch_size_per_image": AT_LEAST_1,
    "positive_fraction": SHARE,
    "nms_thresh": SHARE,
    "test_nms_thresh": SHARE,
    "test_score_thresh": SHARE,
    "test_topk_per_image": AT_LEAST_1,
    "max_detections_per_image": AT_LEAST_1,
    **dict.fromkeys(("queries", "encoder_layers", "decoder_layers", "feedforward"), AT_LEAST_1),
    "denoising_queries": AT_LEAST_1,
    "label_noise": SHARE,
    **dict.fromkeys(("height", "width", "output_size"), Range(1, 4096)),
    "sampling_ratio": AT_LEAST_0,
    "canonical_box_size": AT_LEAST_1,
    "prior_prob": Range(0, 0.999, above=True),
    **dict.fromkeys(("sizes", "aspect_ratios", "weights"), POSITIVE),
    "strides": AT_LEAST_1,
    "pre_nms_topk": AT_LEAST_1,
    "post_nms_topk": AT_LEAST_1,
    "pixel_std": POSITIVE,
}  # fmt: skip

# Key of a yaml config -> argument with the same range.
YACS_RULES: dict[str, str] = {
    "SOLVER.IMS_PER_BATCH": "batch_size",
    "DATALOADER.NUM_WORKERS": "num_workers",
    "INPUT.MIN_SIZE_TRAIN": "short_sides",
    "INPUT.MAX_SIZE_TRAIN": "max_long_side",
    "INPUT.MIN_SIZE_TEST": "short_sides",
    "INPUT.MAX_SIZE_TEST": "max_long_side",
    "INPUT.SEMANTIC_CROPS.CROP": "crop",
    "INPUT.SEMANTIC_CROPS.SHORT_SIDE": "short_side",
    "INPUT.SEMANTIC_CROPS.LONG_SIDE": "long_side",
    "INPUT.SEMANTIC_CROPS.RATIOS": "ratios",
    "TEST.AUG.MIN_SIZES": "short_sides",
    "TEST.AUG.MAX_SIZE": "max_long_side",
    "SOLVER.BASE_LR": "lr",
    "SOLVER.WEIGHT_DECAY": "weight_decay",
    "SOLVER.LAYER_DECAY": "layer_decay",
    "SOLVER.BACKBONE_MULTIPLIER": "lr_factors",
    "SOLVER.GAMMA": "gamma",
    "SOLVER.WARMUP_ITERS": "warmup_iterations",
    "SOLVER.WARMUP_FACTOR": "warmup_factor",
    "SOLVER.STEPS": "milestones",
    "SOLVER.EPOCH_STEPS": "milestones",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": "weight_decay",
    "MODEL.ROI_HEADS.NUM_CLASSES": "num_classes",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "batch_size_per_image",
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": "positive_fraction",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "test_score_thresh",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": "test_nms_thresh",
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": "batch_size_per_image",
    "MODEL.RPN.POSITIVE_FRACTION": "positive_fraction",
    "MODEL.RPN.NMS_THRESH": "nms_thresh",
    "MODEL.RETINANET.NUM_CLASSES": "num_classes",
    "MODEL.DINO.NUM_CLASSES": "num_classes",
    "MODEL.DINO.QUERIES": "queries",
    "MODEL.DINO.DENOISING_QUERIES": "denoising_queries",
    "MODEL.DINO.LABEL_NOISE": "label_noise",
    "MODEL.RETINANET.SCORE_THRESH_TEST": "test_score_thresh",
    "MODEL.RETINANET.NMS_THRESH_TEST": "test_nms_thresh",
    "MODEL.RETINANET.PRIOR_PROB": "prior_prob",
    "MODEL.ATSS.TOPK": "topk",
    "MODEL.REPPOINTS_V2.TOPK": "topk",
    "MODEL.REPPOINTS_V2.CORNER_CHANNELS": "channels",
    "MODEL.ATSS.BOX_LOSS_WEIGHT": "box_loss_weight",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": "num_classes",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": "channels",
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": "loss_weight",
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": "num_keypoints",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "channels",
    "MODEL.ROI_MASK_HEAD.CONV_DIM": "channels",
    "MODEL.FPN.OUT_CHANNELS": "out_channels",
    "MODEL.PIXEL_STD": "pixel_std",
    "MODEL.UPERNET.DROPOUT": "dropout",
    "MODEL.UPERNET.AUXILIARY_WEIGHT": "auxiliary_weight",
    "MODEL.UPERNET.AUXILIARY_CHANNELS": "auxiliary_channels",
    "MODEL.UPERNET.CLASS_WEIGHTS": "class_weights",
    "MODEL.UPERNET.OHEM_THRESHOLD": "ohem_threshold",
    "MODEL.UPERNET.OHEM_MIN_KEPT": "ohem_min_kept",
    "MODEL.SEGMENTOR.TRAIN_SIZE": "train_size",
    "MODEL.SEGMENTOR.WINDOW": "window",
    "MODEL.SEGMENTOR.WINDOW_STRIDE": "window_stride",
    "TEST.DETECTIONS_PER_IMAGE": "max_detections_per_image",
}


# Arguments that must not be an empty list.
NOT_EMPTY = frozenset({"short_sides", "crop_short_sides", "ratios", "depths", "embed_dim"})


def range_problem(key: str, name: str, value: object) -> str | None:
    """Describe why a value is invalid, None if it is valid.

    Args:
        key: key of the config, for the message.
        name: name of the argument, a key of ``RULES``; other names are not checked.
        value: a number, a nested list of numbers, or anything else, which is not checked.
    """
    if name in NOT_EMPTY and isinstance(value, list | tuple) and not value:
        return f"{key} must not be empty."
    rule = RULES.get(name)
    if rule is None or rule.holds(value):
        return None
    return f"{key} must be {rule}, got {value}."
