"""Translate LazyConfigs (``.py``, and the yaml that a run saves) to settings and back."""

import copy
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.registry import _convert_target_to_string
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..data import loader
from ..moved import current_name
from .lazy_overrides import SECTIONS, apply_overrides
from .lazy_tree import calls, target_of
from .length import Length, scale_milestones
from .options import TrainOptions, default_options
from .own_data import from_record
from .settings import Given, ModelSettings, Settings
from .skeleton import build_without_memory
from .solver import Schedule

# Setting -> key. The names of options are keys below ``train``.
KEYS = {
    "epochs": "schedule.epochs",
    "iterations": "schedule.iterations",
    "milestones": "schedule.milestones",
    "warmup": "schedule.warmup_iterations",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "lr_factors": "optimizer.lr_factors",
    "no_decay_names": "optimizer.no_decay_names",
    "batch_size": "dataloader.train.batch_size",
    "train_sets": "dataloader.train.datasets",
    "class_weights": "model.loss.class_weights",
    "own_data": "own_data",
    **{name: f"train.{name}" for name in default_options()},
}
# Arguments of heads that limit the detections per image.
DETECTIONS = ("test_topk_per_image", "max_detections_per_image", "instances_per_image")
OBJECTS = {"allow_objects": True}
LOCATE = "detectron2.utils.registry.locate"
# Modules that a saved config may call. A .py config may call anything, because it is code.
TRUSTED = ("focalnet_det.", "detectron2.", "torch.nn.", "torchvision.", "torch.optim.")


def load_code(path: Path, overrides: list[str]) -> DictConfig:
    """Load a ``.py`` config, and apply overrides.

    Raises: ValueError for a missing section or an invalid override, KeyError for an override of a
        key that the config does not have.
    """
    try:
        cfg = LazyConfig.load(str(path))
    except (ValueError, KeyError, TypeError, OSError, ImportError):
        raise
    except Exception as error:  # a .py config is code, and can raise any error
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}.") from error
    missing = [name for name in SECTIONS if name not in cfg]
    if missing:
        raise ValueError(f"{path} does not define {', '.join(missing)}.")
    return overridden(cfg, overrides)


def load_saved(content: dict[str, Any], path: Path, overrides: list[str]) -> DictConfig:
    """Load the config that a run has saved as yaml, and apply overrides.

    Raises: ValueError and KeyError as :func:`load_code`; ValueError if the config calls anything
        outside this package, Detectron2, PyTorch and torchvision.
    """
    cfg = OmegaConf.create(content, flags=OBJECTS)
    missing = [name for name in SECTIONS if name not in cfg]
    if missing:
        raise ValueError(f"{path} is not a config of a run: it lacks {', '.join(missing)}.")
    for key, node in calls(cfg):
        target = node["_target_"] = current_name(str(node["_target_"]))
        # Arguments that are functions are looked up by name, which must be as trusted.
        names = [target, str(node["name"])] if target == LOCATE else [target]
        if not all(name.startswith(TRUSTED) for name in names):
            raise ValueError(
                f"{path}: {key or 'it'} calls {names[-1]}. A saved config may only call "
                "focalnet_det, detectron2, torch.nn, torch.optim and torchvision: use the .py "
                "config instead."
            )
    return overridden(cfg, overrides)


def overridden(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """Apply overrides to a config; an overridden length scales the milestones."""
    before = _length(cfg)
    cfg = apply_overrides(cfg, overrides)
    names = given(overrides)
    if before is not None and "length" in names:
        _set_length(cfg, scale_milestones(before, _length(cfg) or before, names, KEYS))
    return cfg


def given(overrides: list[str]) -> Given:
    """Return the settings that overrides set."""
    keys = {item.partition("=")[0].lstrip("+~") for item in overrides}
    names = {n for n, k in KEYS.items() if any(key == k or key.startswith(f"{k}.") for key in keys)}
    if names & {"epochs", "iterations"}:
        names.add("length")
    if any(key.rpartition(".")[2] in DETECTIONS for key in keys):
        names.add("detections")
    return Given(frozenset(names), KEYS, "{key}={value}", "null")


def _length(cfg: DictConfig) -> Length | None:
    node = cfg.get("schedule")
    if not isinstance(node, DictConfig) or not {"epochs", "iterations"} <= set(node):
        return None
    milestones = tuple(node.get("milestones") or ())
    return Length(epochs=node.epochs, iterations=node.iterations, milestones=milestones)


def _set_length(cfg: DictConfig, length: Length) -> None:
    cfg.schedule.epochs, cfg.schedule.iterations = length.epochs, length.iterations
    if "milestones" in cfg.schedule:
        cfg.schedule.milestones = list(length.milestones)


def read_settings(cfg: DictConfig) -> Settings:
    """Read the settings of a config.

    Raises: ConfigError or ValueError for invalid values.
    """
    train = cfg.dataloader.train
    datasets = train.get("datasets") or ()
    tests = cfg.dataloader.get("test", None) or []
    options: Any = OmegaConf.to_container(cfg.train, resolve=True)
    unknown = sorted(set(options) - set(default_options()))
    if unknown:
        raise ValueError(f"Unknown run options: {', '.join(f'train.{name}' for name in unknown)}.")
    return Settings(
        model=read_model(cfg.model),
        train_sets=(datasets,) if isinstance(datasets, str) else tuple(datasets),
        test_sets=tuple(node.dataset for node in tests),
        batch_size=train.batch_size,
        learning_rate=cfg.optimizer.lr,
        schedule=instantiate(cfg.schedule),
        options=TrainOptions(**options),
        masks=train.get("masks", True),
        own_data=from_record(_plain(cfg.get("own_data") or {})),
    )


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def read_model(model: DictConfig) -> ModelSettings:
    """Read the settings of a model that depend on data."""
    panoptic = "sem_seg_head" in model and "roi_heads" in model
    unified = "panoptic" in (model.get("tasks") or ())
    things = model.get("things") if unified else None
    loss = model.get("loss")
    weighted = isinstance(loss, DictConfig) and "class_weights" in loss
    weights = loss.class_weights if weighted else None
    return ModelSettings(
        classes=_first(model.roi_heads if panoptic else model, "num_classes"),
        stuff=model.sem_seg_head.num_classes if panoptic else None,
        unified=unified,
        things=None if things is None else tuple(things),
        keypoints=_first(model, "num_keypoints"),
        detections=min((n for name in DETECTIONS for n in values(model, name)), default=None),
        weighted=weighted,
        class_weights=None if weights is None else tuple(weights),
        conventions=model.get("conventions"),
    )


def values(node: Any, name: str) -> Iterator[Any]:
    """Yield the values of every field of a name that is not an interpolation."""
    if isinstance(node, DictConfig):
        for key in map(str, node):
            if not OmegaConf.is_interpolation(node, key):
                if key == name:
                    yield node[key]
                else:
                    yield from values(node[key], name)
    elif isinstance(node, ListConfig):
        for item in node:
            yield from values(item, name)


def _first(node: Any, name: str) -> Any:
    return next(values(node, name), None)


def write_settings(cfg: DictConfig, settings: Settings) -> DictConfig:
    """Return a copy of a config, updated where the settings differ from it."""
    before, cfg = read_settings(cfg), copy.deepcopy(cfg)
    write_model(cfg.model, before.model, settings.model)
    train = cfg.dataloader.train
    if settings.train_sets != before.train_sets:
        train.datasets = list(settings.train_sets)
    if settings.test_sets != before.test_sets:
        # Every set is evaluated with the loader of the config's first one.
        loaders = cfg.dataloader.test[:1]
        tests = [{**node, "dataset": name} for node in loaders for name in settings.test_sets]
        cfg.dataloader.test = tests
        if loaders and not tests:
            # Whoever predicts with the model must know how images are prepared.
            cfg.dataloader.test_mapper = _mapper_node(loaders[0])
    if settings.batch_size != before.batch_size:
        train.batch_size = settings.batch_size
    if settings.learning_rate != before.learning_rate:
        cfg.optimizer.lr = settings.learning_rate
    for field in fields(Schedule):
        value = getattr(settings.schedule, field.name)
        if value != getattr(before.schedule, field.name):
            cfg.schedule[field.name] = list(value) if isinstance(value, tuple) else value
    for name, value in vars(settings.options).items():
        if value != getattr(before.options, name):
            cfg.train[name] = value
    if settings.own_data is not None:
        cfg.own_data = settings.own_data.record()
    return cfg


def write_model(model: DictConfig, before: ModelSettings, after: ModelSettings) -> None:
    """Write class counts, limits and weights into the config of a model."""
    if after.stuff != before.stuff:
        model.sem_seg_head.num_classes = after.stuff
    if after.classes != before.classes:
        set_everywhere(
            model if after.stuff is None else model.roi_heads, "num_classes", after.classes
        )
    if after.things != before.things:
        model.things = None if after.things is None else list(after.things)
    if after.keypoints != before.keypoints:
        set_everywhere(model, "num_keypoints", after.keypoints)
    if after.detections != before.detections:
        for name in DETECTIONS:
            set_everywhere(model, name, after.detections)
    if after.conventions != before.conventions:
        model.conventions = after.conventions
    if after.class_weights != before.class_weights:
        model.loss.class_weights = (
            None if after.class_weights is None else list(after.class_weights)
        )


def set_everywhere(node: Any, name: str, value: Any) -> None:
    """Set every field of a name that is not an interpolation."""
    if isinstance(node, DictConfig):
        for key in node:
            if key == name:
                if not OmegaConf.is_interpolation(node, key):
                    node[key] = value
            else:
                set_everywhere(node[key], name, value)
    elif isinstance(node, ListConfig):
        for item in node:
            set_everywhere(item, name, value)


def config_text(cfg: DictConfig) -> str:
    """Return a config as yaml for :func:`load_saved`, with callables by name."""
    content = _callables_to_names(OmegaConf.to_container(cfg, resolve=False))
    return yaml.safe_dump(content, default_flow_style=None, allow_unicode=True, width=100)


def _callables_to_names(value: Any) -> Any:
    """Replace callables by their names, in nested values."""
    if isinstance(value, dict):
        return {
            k: _convert_target_to_string(v)
            if k == "_target_" and callable(v)
            else _callables_to_names(v)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_callables_to_names(item) for item in value]
    if callable(value):
        name = _convert_target_to_string(value)
        return {"_target_": LOCATE, "name": name}
    return value


def build_model(cfg: DictConfig) -> Any:
    """Build the model of a config."""
    return instantiate(cfg.model)


def build_skeleton(cfg: DictConfig) -> tuple[Any, list[str]]:
    """Build the model without memory for its weights.

    Returns: the model, and no problems: `lazy_check` finds arguments that nothing reads.
    Raises: as the parts of the model do.
    """
    return build_without_memory(lambda _: instantiate(cfg.model)), []


def optimizer_names(cfg: DictConfig) -> dict[str, Any]:
    """Return the arguments of the optimizer that select parameters."""
    names = ("lr_factors", "no_decay_names", "layer_decay")
    return {n: _plain(cfg.optimizer[n]) for n in names if cfg.optimizer.get(n) is not None}


def build_optimizer(cfg: DictConfig, model: Any) -> Any:
    """Build the optimizer of a config for a model."""
    node = cfg.optimizer.copy()
    node.model = model
    return instantiate(node)


def build_train_loader(cfg: DictConfig) -> Any:
    """Build the loader of a config's training sets."""
    return instantiate(cfg.dataloader.train)


def build_test_mapper(cfg: DictConfig) -> Any:
    """Build what turns an image into the model's input as a config's first test set would.

    Raises: ValueError if the config has no test set, or a loader of its own.
    """
    tests = cfg.dataloader.get("test", None) or []
    node = _mapper_node(tests[0]) if tests else cfg.dataloader.get("test_mapper", None)
    if node is None:
        raise ValueError(
            "The config does not say how images are prepared for evaluation: give it a "
            "dataloader.test, as the recipes have."
        )
    return instantiate(node)


def _mapper_node(node: DictConfig) -> DictConfig:
    """Return the call of the mapper that a test loader calls."""
    if target_of(node) is not loader.build_test_loader:
        raise ValueError(
            "dataloader.test must call focalnet_det.data.loader.build_test_loader, not "
            f"{node['_target_']}."
        )
    arguments = {k: v for k, v in node.items() if k not in ("_target_", "dataset", "num_workers")}
    return OmegaConf.create(
        {"_target_": "focalnet_det.data.loader.build_test_mapper", **arguments}, flags=OBJECTS
    )


def build_test_loader(cfg: DictConfig, name: str) -> Any:
    """Build the loader of one of a config's test sets."""
    return instantiate(next(node for node in cfg.dataloader.test if node.dataset == name))
