"""Detectron2's yaml configs (yacs): into settings, and back. Nothing outside this folder asks."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model as build_detectron2_model
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from detectron2.utils.file_io import PathManager

from ..data.augmentation import POLICIES, evaluation_resize
from ..data.build import TrainLoader
from ..data.build import build_test_loader as build_loader_of_tests
from ..data.build import build_train_loader as build_loader
from ..data.semantic_augmentation import semantic_crops
from ..heads.mmdet_conventions import MmdetRetinaNet, MmdetROIHeads, MmdetRPN
from ..heads.mmdet_rcnn import MmdetRCNN
from .length import Length, follow_override
from .options import TrainOptions, default_options, yacs_key
from .own_data import from_record
from .settings import Given, ModelSettings, Settings
from .solver import Schedule, adamw

BASE = "_BASE_"
# Of INPUT.POLICY, which then reads INPUT.SEMANTIC_CROPS.
SEMANTIC_CROPS = "semantic_crops"
# Detectron2's registered name: what stands in for it.
MMDET_PARTS = {"RPN": MmdetRPN, "StandardROIHeads": MmdetROIHeads}
MMDET_MODELS = {"GeneralizedRCNN": MmdetRCNN, "RetinaNet": MmdetRetinaNet}
DECAYS = {
    "WarmupMultiStepLR": "multistep",
    "WarmupCosineLR": "cosine",
    "WarmupPolyLR": "poly",  # of power 1
}
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


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the content of one yaml file; tags that would run code are refused.

    Raises: ValueError if it is no yaml mapping.
    """
    try:
        with PathManager.open(str(path), "r") as file:
            content = yaml.safe_load(file)
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"{path} holds a yaml tag that runs code or makes objects ({error.problem}): configs "
            "are plain values."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid yaml: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not valid yaml: it is nested too deeply.") from error
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{path} is no config: a mapping of keys is expected.")
    return content or {}


def with_bases(path: Path, content: dict[str, Any], seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the content of a file over that of its ``_BASE_`` files.

    Raises: ValueError if a base is missing or, directly or not, its own base.
    """
    here = path.resolve()
    if here in seen:
        names = " -> ".join(p.name for p in (*seen[seen.index(here) :], here))
        raise ValueError(f"{path} is its own {BASE}: {names}.")
    content = dict(content)
    bases = content.pop(BASE, [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        file = path.parent / Path(base).expanduser()
        if not file.is_file():
            raise ValueError(f"{path}: no such {BASE} file: {file}.")
        merge(merged, with_bases(file, read_yaml(file), (*seen, here)))
    merge(merged, content)
    return merged


def merge(target: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Write nested values over those of another mapping, in place."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            merge(target[key], value)
        else:
            target[key] = value


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf of nested mappings."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def load(content: dict[str, Any], path: Path, overrides: list[str]) -> CfgNode:
    """Return a config from the content of its file and overrides.

    Raises: KeyError for a key that does not exist, ValueError for a value of another type or an
        override without a value.
    """
    cfg = default_config()
    merged = with_bases(path, content)
    for key, _ in flat(merged):
        check_key(cfg, key, f"{path}: ")
    # Files of Detectron2 before 0.1 name no version.
    merged.setdefault("VERSION", cfg.VERSION)
    try:
        cfg.merge_from_other_cfg(CfgNode(merged))
    except (AssertionError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    keys = apply_overrides(cfg, overrides)
    # A saved config spells out every key; those that were meant are on its list.
    meant = content.get("GIVEN_KEYS", [key for key, _ in flat(content) if key != BASE])
    cfg.GIVEN_KEYS = sorted({*keys, *meant})
    return cfg


def check_key(cfg: CfgNode, key: str, where: str = "") -> None:
    """Raise: KeyError if a config has no such key."""
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
    """Write ``KEY VALUE`` or ``KEY=VALUE`` into a config; the length's milestones follow it.

    Returns: the keys.
    Raises: KeyError and ValueError as :func:`load`.
    """
    before, keys = _length(cfg), []
    items = iter(overrides)
    for item in items:
        key, equals, rest = item.partition("=")
        value = rest if equals else next(items, None)
        if value is None:
            raise ValueError(
                f"Overrides of a .yaml config read KEY VALUE or KEY=VALUE; {key!r} has no value."
            )
        check_key(cfg, key)
        try:
            cfg.merge_from_list([key, value])
        except (AssertionError, AttributeError, SyntaxError) as error:
            raise ValueError(f"{key}={value} is not understood: {error}") from error
        except ValueError as error:
            raise ValueError(f"{key}={value}: {error}") from error
        keys.append(key)
    names = given(overrides)
    if "length" in names:
        after = _length(cfg)
        if "iterations" in names and after.iterations is None:
            after = replace(after, iterations=cfg.SOLVER.MAX_ITER)
        steps = "SOLVER.EPOCH_STEPS" if after.iterations is None else "SOLVER.STEPS"
        keys_of = {**KEYS, "milestones": steps}
        _set_length(cfg, follow_override(before, after, names, keys_of))
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
    if length.iterations is None:
        solver.EPOCHS, solver.EPOCH_STEPS = length.epochs, tuple(length.milestones)
    else:
        solver.EPOCHS, solver.MAX_ITER = 0, length.iterations
        solver.STEPS = tuple(length.milestones)


def read_settings(cfg: CfgNode) -> Settings:
    """Return the settings of a config.

    Raises: ConfigError or ValueError for values that cannot be used.
    """
    return Settings(
        model=read_model(cfg),
        train_sets=tuple(cfg.DATASETS.TRAIN),
        test_sets=tuple(cfg.DATASETS.TEST),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        learning_rate=cfg.SOLVER.BASE_LR,
        schedule=read_schedule(cfg.SOLVER),
        options=read_options(cfg),
        own_data=from_record(_plain(cfg.OWN_DATA)),
    )


def _plain(node: Any) -> Any:
    """Return nested mappings and lists as new ones: yaml notes where one is met twice."""
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    return [_plain(item) for item in node] if isinstance(node, list | tuple) else node


def is_panoptic(cfg: CfgNode) -> bool:
    """Return whether a model has a box head and a semantic head."""
    return bool(cfg.MODEL.META_ARCHITECTURE == "PanopticFPN")


def is_semantic(cfg: CfgNode) -> bool:
    """Return whether a model has a semantic head alone."""
    return "Seg" in cfg.MODEL.META_ARCHITECTURE


def read_model(cfg: CfgNode) -> ModelSettings:
    """Return the numbers of a model that follow from data."""
    model = cfg.MODEL
    name, panoptic = model.META_ARCHITECTURE, is_panoptic(cfg)
    semantic = is_semantic(cfg)
    heads = {"RetinaNet": model.RETINANET, "FCOS": model.RETINANET}
    head = model.SEM_SEG_HEAD if semantic else heads.get(name, model.ROI_HEADS)
    weighted = semantic and model.SEM_SEG_HEAD.NAME == "UPerNetHead"
    return ModelSettings(
        classes=head.NUM_CLASSES,
        stuff=model.SEM_SEG_HEAD.NUM_CLASSES if panoptic else None,
        keypoints=model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if model.KEYPOINT_ON else None,
        detections=None if semantic else cfg.TEST.DETECTIONS_PER_IMAGE,
        weighted=weighted,
        class_weights=tuple(model.UPERNET.CLASS_WEIGHTS) or None if weighted else None,
    )


def read_schedule(solver: CfgNode) -> Schedule:
    """Return the schedule: ``SOLVER.EPOCHS`` with ``EPOCH_STEPS``, or ``MAX_ITER`` with ``STEPS``.

    Raises: ValueError for a schedule of another name.
    """
    if solver.LR_SCHEDULER_NAME not in DECAYS:
        raise ValueError(
            f"Unknown SOLVER.LR_SCHEDULER_NAME {solver.LR_SCHEDULER_NAME!r}. "
            f"Known: {', '.join(DECAYS)}."
        )
    in_epochs = solver.EPOCHS > 0
    return Schedule(
        epochs=solver.EPOCHS if in_epochs else None,
        iterations=None if in_epochs else solver.MAX_ITER,
        decay=DECAYS[solver.LR_SCHEDULER_NAME],
        milestones=tuple(solver.EPOCH_STEPS if in_epochs else solver.STEPS),
        gamma=solver.GAMMA,
        warmup_iterations=solver.WARMUP_ITERS,
        warmup_factor=solver.WARMUP_FACTOR,
    )


def read_options(cfg: CfgNode) -> TrainOptions:
    """Return the run options, each under its key of ``options.yacs_key``.

    Raises: ConfigError or ValueError for values that cannot be used.
    """
    found: dict[str, Any] = {}
    for name in default_options():
        section, _, key = yacs_key(name).rpartition(".")
        node = cfg
        for part in section.split(".") if section else ():
            node = node[part]
        found[name] = node[key]
    # Detectron2's default is "cuda", also where there is none: no one has asked for it.
    found["device"] = "auto" if cfg.MODEL.DEVICE == "cuda" else cfg.MODEL.DEVICE
    found["ddp"] = dict(found["ddp"])
    if cfg.SOLVER.AMP.ENABLED and found["precision"] == "bf16":
        raise ValueError("SOLVER.AMP.ENABLED means fp16: switch it off for SOLVER.PRECISION bf16.")
    if cfg.SOLVER.AMP.ENABLED:
        found["precision"] = "fp16"
    return TrainOptions(**{**found, **read_clipping(cfg.SOLVER)})


def read_clipping(solver: CfgNode) -> dict[str, float]:
    """Return the run options that ``SOLVER.CLIP_GRADIENTS`` asks for."""
    clip = solver.CLIP_GRADIENTS
    # With SGD, Detectron2 builds the clipping into the optimizer.
    limit = float(clip.CLIP_VALUE) if clip.ENABLED and solver.OPTIMIZER == "ADAMW" else 0.0
    by_value = clip.CLIP_TYPE == "value"
    return {"clip_norm": 0.0 if by_value else limit, "clip_value": limit if by_value else 0.0}


def write_settings(cfg: CfgNode, settings: Settings) -> CfgNode:
    """Return a copy of a config in which what differs from it is as the settings say."""
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
        model.ROI_HEADS.NUM_CLASSES = model.RETINANET.NUM_CLASSES = after.classes
    if after.stuff != before.stuff:
        model.SEM_SEG_HEAD.NUM_CLASSES = after.stuff
    if after.keypoints != before.keypoints:
        model.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = after.keypoints
    if after.detections != before.detections:
        cfg.TEST.DETECTIONS_PER_IMAGE = after.detections
    if after.class_weights != before.class_weights:
        model.UPERNET.CLASS_WEIGHTS = tuple(after.class_weights or ())


def config_text(cfg: CfgNode) -> str:
    """Return a config as yaml that :func:`load` reads."""
    return str(yaml.safe_dump(_plain(cfg), default_flow_style=None, width=100))


def build_model(cfg: CfgNode, device: str = "cpu") -> Any:
    """Return the model of a config.

    Raises: ValueError for unknown ``MODEL.CONVENTIONS``.
    """
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = device  # the engine moves it
    apply_conventions(cfg)
    return build_detectron2_model(cfg)


def apply_conventions(cfg: CfgNode) -> None:
    """Name the parts that ``MODEL.CONVENTIONS`` asks for.

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
    """Return the optimizer of a config for a model.

    Raises: ValueError for an unknown ``SOLVER.OPTIMIZER``.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER == "SGD":
        return build_detectron2_optimizer(cfg, model)
    if solver.OPTIMIZER == "ADAMW":
        factor = solver.BACKBONE_MULTIPLIER
        # An FPN is part of Detectron2's backbone, but not of the pretrained network.
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
    """Return the training augmentation of a config's ``INPUT``.

    Raises: ValueError for an unknown policy.
    """
    if node.POLICY == SEMANTIC_CROPS:
        fields = {key.lower(): value for key, value in node.SEMANTIC_CROPS.items()}
        if node.FORMAT != "RGB":
            fields["channels"] = node.FORMAT
        return semantic_crops(**fields)
    if node.POLICY not in POLICIES:
        known = ", ".join([*POLICIES, SEMANTIC_CROPS])
        raise ValueError(f"Unknown INPUT.POLICY {node.POLICY!r}. Known: {known}.")
    return POLICIES[node.POLICY](
        short_sides=node.MIN_SIZE_TRAIN,
        max_long_side=node.MAX_SIZE_TRAIN,
        antialias=node.ANTIALIAS,
    )


def build_train_loader(cfg: CfgNode) -> TrainLoader:
    """Return the loader of a config's training sets."""
    return build_loader(
        datasets=cfg.DATASETS.TRAIN,
        augmentations=augmentations(cfg.INPUT),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        masks=cfg.MODEL.MASK_ON,
        keypoints=cfg.MODEL.KEYPOINT_ON,
        image_format=cfg.INPUT.FORMAT,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
    )


def build_test_loader(cfg: CfgNode, name: str) -> Any:
    """Return the loader of one of a config's test sets."""
    test_time, node = cfg.TEST.AUG, cfg.INPUT

    def resize(short_side: int, max_long_side: int) -> list[Any]:
        return evaluation_resize(
            short_side=short_side, max_long_side=max_long_side, antialias=node.ANTIALIAS
        )

    sides = test_time.MIN_SIZES if test_time.ENABLED else ()
    return build_loader_of_tests(
        dataset=name,
        augmentations=resize(node.MIN_SIZE_TEST, node.MAX_SIZE_TEST),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        image_format=node.FORMAT,
        views=[resize(side, test_time.MAX_SIZE) for side in sides],
        flip=test_time.ENABLED and test_time.FLIP,
    )
