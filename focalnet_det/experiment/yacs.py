"""Translate Detectron2's yaml configs (yacs) to settings and back."""

import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from .length import Length, scale_milestones
from .options import TrainOptions, default_options, yacs_key
from .own_data import from_record
from .settings import Given, ModelSettings, Settings
from .skeleton import build_without_memory
from .solver import Schedule
from .yacs_parts import (
    build_model,
    build_optimizer,
    build_test_loader,
    build_test_mapper,
    build_train_loader,
)
from .yaml_files import BASE, flatten, with_bases

__all__ = [
    "build_model",
    "build_optimizer",
    "build_test_loader",
    "build_test_mapper",
    "build_train_loader",
]

DECAYS = {
    "WarmupMultiStepLR": "multistep",
    "WarmupCosineLR": "cosine",
    "WarmupPolyLR": "poly",
}
LENGTH_KEYS = ("SOLVER.EPOCHS", "SOLVER.MAX_ITER", "SOLVER.EPOCH_STEPS", "SOLVER.STEPS")
KEYS = {
    "epochs": "SOLVER.EPOCHS",
    "iterations": "SOLVER.MAX_ITER",
    "milestones": "SOLVER.STEPS",
    "warmup": "SOLVER.WARMUP_ITERS",
    "learning_rate": "SOLVER.BASE_LR",
    "weight_decay": "SOLVER.WEIGHT_DECAY",
    "lr_factors": "SOLVER.BACKBONE_MULTIPLIER",
    "no_decay_names": "SOLVER.NO_DECAY_NAMES",
    "batch_size": "SOLVER.IMS_PER_BATCH",
    "train_sets": "DATASETS.TRAIN",
    "class_weights": "MODEL.UPERNET.CLASS_WEIGHTS",
    "detections": "TEST.DETECTIONS_PER_IMAGE",
    "own_data": "OWN_DATA",
    **{name: yacs_key(name) for name in default_options()},
}


def default_config() -> CfgNode:
    """Return Detectron2's defaults with the keys of this package."""
    from .. import add_focalnet_config

    cfg = get_cfg()
    add_focalnet_config(cfg)
    return cfg


def load(content: dict[str, Any], path: Path, overrides: list[str]) -> CfgNode:
    """Build a config from the content of its file and overrides.

    Args:
        content: content of the yaml file.
        path: path of the file, for ``_BASE_`` and messages.
        overrides: ``KEY VALUE`` or ``KEY=VALUE``.
    Raises: KeyError for a key that does not exist, ValueError for a value of another type or an
        override without a value.
    """
    cfg = default_config()
    merged = with_bases(path, content)
    for key, value in flatten(merged):
        check_key(cfg, key, f"{path}: ")
        node = merged
        *sections, leaf = key.split(".")
        for part in sections:
            node = node[part]
        node[leaf] = as_float(cfg, key, value)
    if merged.setdefault("VERSION", cfg.VERSION) != cfg.VERSION:
        raise ValueError(f"{path}: VERSION must be {cfg.VERSION}, got {merged['VERSION']}.")
    try:
        cfg.merge_from_other_cfg(CfgNode(merged))
    except (AssertionError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    # A saved config has every key, and lists those that the user had set.
    explicit = [key for key, _ in flatten(content) if key != BASE]
    cfg.GIVEN_KEYS = sorted(content.get("GIVEN_KEYS", explicit))
    keys = apply_overrides(cfg, overrides)
    cfg.GIVEN_KEYS = sorted({*cfg.GIVEN_KEYS, *keys})
    return cfg


def as_float(cfg: CfgNode, key: str, value: Any) -> Any:
    """Convert an int to float if the config has a float, because yacs refuses an int there."""
    node: Any = cfg
    for part in key.split("."):
        node = node.get(part) if isinstance(node, CfgNode) else None
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_int and isinstance(node, float) else value


def check_key(cfg: CfgNode, key: str, where: str = "") -> None:
    """Check that a config has a key.

    Raises: KeyError if it does not.
    """
    node: Any = cfg
    for part in key.split("."):
        if isinstance(node, CfgNode) and node.is_new_allowed():
            return
        if not isinstance(node, CfgNode) or part not in node:
            known = list(node) if isinstance(node, CfgNode) else []
            close = difflib.get_close_matches(part, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise KeyError(f"{where}The config has no key {key!r}.{hint}")
        node = node[part]


def apply_overrides(cfg: CfgNode, overrides: list[str]) -> list[str]:
    """Apply ``KEY VALUE`` or ``KEY=VALUE`` to a config; an overridden length scales milestones.

    Returns: the overridden keys.
    Raises: KeyError and ValueError as :func:`load`.
    """
    before, keys = _length(cfg), []
    items = iter(overrides)
    for item in items:
        key, equals, rest = item.partition("=")
        value = rest if equals else next(items, None)
        if value is None:
            raise ValueError(
                f"An override of a .yaml config must be KEY VALUE or KEY=VALUE, but {key!r} has no "
                "value."
            )
        check_key(cfg, key)
        try:
            cfg.merge_from_list([key, as_float(cfg, key, CfgNode._decode_cfg_value(value))])
        except (AssertionError, AttributeError, SyntaxError) as error:
            raise ValueError(f"Invalid override {key}={value}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{key}={value}: {error}") from error
        keys.append(key)
    names = given(overrides)
    if "length" in names:
        after = _length(cfg)
        if "iterations" in names and after.iterations is None:
            steps = cfg.SOLVER.STEPS if "SOLVER.STEPS" in keys else after.milestones
            after = replace(after, iterations=cfg.SOLVER.MAX_ITER, milestones=tuple(steps))
        name = "SOLVER.EPOCH_STEPS" if after.iterations is None else "SOLVER.STEPS"
        keys_of = {**KEYS, "milestones": name}
        _set_length(cfg, scale_milestones(before, after, names, keys_of))
    return keys


def given(overrides: list[str]) -> Given:
    """Return what overrides set."""
    keys, items = set(), iter(overrides)
    for item in items:
        key, equals, _ = item.partition("=")
        keys.add(key)
        if not equals:
            next(items, None)
    names = {name for name, key in KEYS.items() if key in keys}
    if "SOLVER.EPOCH_STEPS" in keys:
        names.add("milestones")
    if names & {"epochs", "iterations"}:
        names.add("length")
    return Given(frozenset(names), KEYS, "{key} {value}", "()")


def _length(cfg: CfgNode) -> Length:
    solver = cfg.SOLVER
    if solver.EPOCHS > 0:
        return Length(epochs=solver.EPOCHS, iterations=None, milestones=tuple(solver.EPOCH_STEPS))
    return Length(epochs=None, iterations=solver.MAX_ITER, milestones=tuple(solver.STEPS))


def _set_length(cfg: CfgNode, length: Length) -> None:
    solver = cfg.SOLVER
    # The keys of the file in the other unit no longer count as set by the user.
    cfg.GIVEN_KEYS = [key for key in cfg.GIVEN_KEYS if key not in LENGTH_KEYS]
    if length.iterations is None:
        solver.EPOCHS, solver.EPOCH_STEPS = length.epochs, tuple(length.milestones)
    else:
        solver.EPOCHS, solver.MAX_ITER = 0, length.iterations
        solver.STEPS = tuple(length.milestones)


def read_settings(cfg: CfgNode) -> Settings:
    """Read the settings of a config.

    Raises: ConfigError or ValueError for invalid values.
    """
    return Settings(
        model=read_model(cfg),
        train_sets=tuple(cfg.DATASETS.TRAIN),
        test_sets=tuple(cfg.DATASETS.TEST),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        learning_rate=cfg.SOLVER.BASE_LR,
        schedule=read_schedule(cfg.SOLVER),
        options=read_options(cfg),
        masks=cfg.MODEL.MASK_ON,
        own_data=from_record(_plain(cfg.OWN_DATA)),
    )


def _plain(node: Any) -> Any:
    """Copy nested mappings and lists, because yaml writes a repeated object as an alias."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    return [_plain(item) for item in node] if isinstance(node, list | tuple) else node


def is_panoptic(cfg: CfgNode) -> bool:
    """Tell whether a model has a box head and a semantic head."""
    return bool(cfg.MODEL.META_ARCHITECTURE == "PanopticFPN")


def is_semantic(cfg: CfgNode) -> bool:
    """Tell whether the semantic head of a model counts all of its classes."""
    return "Seg" in cfg.MODEL.META_ARCHITECTURE or is_mask2former(cfg)


def is_mask2former(cfg: CfgNode) -> bool:
    """Tell whether a model is a Mask2Former, for any task."""
    return bool(cfg.MODEL.META_ARCHITECTURE == "Mask2Former")


def read_model(cfg: CfgNode) -> ModelSettings:
    """Read the settings of a model that depend on data."""
    model = cfg.MODEL
    name, panoptic = model.META_ARCHITECTURE, is_panoptic(cfg)
    semantic = is_semantic(cfg)
    heads = dict.fromkeys(("RetinaNet", "FCOS", "ATSS", "RepPointsV2"), model.RETINANET)
    heads["DINO"] = model.DINO
    head = model.SEM_SEG_HEAD if semantic else heads.get(name, model.ROI_HEADS)
    weighted = "Seg" in name and model.SEM_SEG_HEAD.NAME == "UPerNetHead"
    tasks = model.MASK2FORMER.TASKS if is_mask2former(cfg) else ()
    limited = "instance" in tasks or not semantic
    return ModelSettings(
        classes=head.NUM_CLASSES,
        stuff=model.SEM_SEG_HEAD.NUM_CLASSES if panoptic else None,
        keypoints=model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if model.KEYPOINT_ON else None,
        unified="panoptic" in tasks,
        detections=cfg.TEST.DETECTIONS_PER_IMAGE if limited else None,
        weighted=weighted,
        class_weights=tuple(model.UPERNET.CLASS_WEIGHTS) or None if weighted else None,
        conventions=model.DINO.CONVENTIONS if name == "DINO" else None,
    )


def read_schedule(solver: CfgNode) -> Schedule:
    """Read the schedule: ``SOLVER.EPOCHS`` with ``EPOCH_STEPS``, or ``MAX_ITER`` with ``STEPS``.

    Raises: ValueError for an unknown name or inconsistent values.
    """
    if solver.LR_SCHEDULER_NAME not in DECAYS:
        raise ValueError(
            f"Unknown SOLVER.LR_SCHEDULER_NAME {solver.LR_SCHEDULER_NAME!r}. "
            f"Known: {', '.join(DECAYS)}."
        )
    in_epochs, decay = solver.EPOCHS > 0, DECAYS[solver.LR_SCHEDULER_NAME]
    steps: dict[str, Any] = {}
    if decay == "multistep":
        milestones = tuple(solver.EPOCH_STEPS if in_epochs else solver.STEPS)
        steps = {"milestones": milestones, "gamma": solver.GAMMA}
    if decay == "poly":
        steps = {"power": solver.POLY_POWER}
    return Schedule(
        epochs=solver.EPOCHS if in_epochs else None,
        iterations=None if in_epochs else solver.MAX_ITER,
        decay=decay,
        **steps,
        warmup_iterations=solver.WARMUP_ITERS,
        warmup_factor=solver.WARMUP_FACTOR,
    )


def read_options(cfg: CfgNode) -> TrainOptions:
    """Read the options of the run, each from its key of ``options.yacs_key``.

    Raises: ConfigError or ValueError for invalid values.
    """
    found: dict[str, Any] = {}
    for name in default_options():
        section, _, key = yacs_key(name).rpartition(".")
        node = cfg
        for part in section.split(".") if section else ():
            node = node[part]
        found[name] = node[key]
    # "cuda" is Detectron2's default, even without a GPU, so it is not an explicit choice.
    found["device"] = "auto" if cfg.MODEL.DEVICE == "cuda" else cfg.MODEL.DEVICE
    found["ddp"] = dict(found["ddp"])
    if cfg.SOLVER.AMP.ENABLED and found["precision"] == "bf16":
        raise ValueError("SOLVER.AMP.ENABLED means fp16: disable it for SOLVER.PRECISION bf16.")
    if cfg.SOLVER.AMP.ENABLED:
        found["precision"] = "fp16"
    return TrainOptions(**{**found, **read_clipping(cfg.SOLVER)})


def read_clipping(solver: CfgNode) -> dict[str, float]:
    """Read the clipping options of the run from ``SOLVER.CLIP_GRADIENTS``."""
    clip = solver.CLIP_GRADIENTS
    # With SGD, Detectron2 builds the clipping into the optimizer.
    limit = float(clip.CLIP_VALUE) if clip.ENABLED and solver.OPTIMIZER == "ADAMW" else 0.0
    by_value = clip.CLIP_TYPE == "value"
    return {"clip_norm": 0.0 if by_value else limit, "clip_value": limit if by_value else 0.0}


def write_settings(cfg: CfgNode, settings: Settings) -> CfgNode:
    """Return a copy of a config, updated where the settings differ from it."""
    before, cfg = read_settings(cfg), cfg.clone()
    write_model(cfg, before.model, settings.model)
    solver, schedule = cfg.SOLVER, settings.schedule
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = settings.train_sets, settings.test_sets
    solver.IMS_PER_BATCH, solver.BASE_LR = settings.batch_size, settings.learning_rate
    if schedule != before.schedule:
        length = Length(
            epochs=schedule.epochs, iterations=schedule.iterations, milestones=schedule.milestones
        )
        _set_length(cfg, length)
        solver.WARMUP_ITERS = schedule.warmup_iterations
    for name, value in vars(settings.options).items():
        if value != getattr(before.options, name):
            *sections, key = yacs_key(name).split(".")
            node = cfg
            for part in sections:
                node = node[part]
            node[key] = value
    if settings.own_data is not None:
        cfg.OWN_DATA = CfgNode(settings.own_data.record(), new_allowed=True)
    return cfg


def write_model(cfg: CfgNode, before: ModelSettings, after: ModelSettings) -> None:
    """Write class counts, limits and weights into a config."""
    model = cfg.MODEL
    if after.classes != before.classes and is_semantic(cfg):
        model.SEM_SEG_HEAD.NUM_CLASSES = after.classes
    elif after.classes != before.classes:
        for head in (model.ROI_HEADS, model.RETINANET, model.DINO):
            head.NUM_CLASSES = after.classes
    if after.conventions != before.conventions:
        model.DINO.CONVENTIONS = after.conventions
    if after.stuff != before.stuff:
        model.SEM_SEG_HEAD.NUM_CLASSES = after.stuff
    if after.keypoints != before.keypoints:
        model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = after.keypoints
    if after.detections != before.detections:
        cfg.TEST.DETECTIONS_PER_IMAGE = after.detections
    if after.class_weights != before.class_weights:
        model.UPERNET.CLASS_WEIGHTS = tuple(after.class_weights or ())


def optimizer_names(cfg: CfgNode) -> dict[str, Any]:
    """Return the arguments of the optimizer that select parameters; SGD has none."""
    solver = cfg.SOLVER
    if solver.OPTIMIZER != "ADAMW":
        return {}
    return {"no_decay_names": solver.NO_DECAY_NAMES, "layer_decay": solver.LAYER_DECAY}


def build_skeleton(cfg: CfgNode) -> tuple[Any, list[str]]:
    """Build the model without memory for its weights.

    Returns: the model, and a problem for every key that nothing reads.
    """
    from .yacs_check import build_and_record, unread_problems

    model, read = build_without_memory(lambda device: build_and_record(cfg, device))
    return model, unread_problems(cfg, read)


def config_text(cfg: CfgNode) -> str:
    """Return a config as yaml for :func:`load`."""
    return str(yaml.safe_dump(_plain(cfg), default_flow_style=None, width=100))
