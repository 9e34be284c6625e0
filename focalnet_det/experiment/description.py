"""Describe a run in one typed form for both kinds of config."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager
from torch import nn

from ..data.classification.class_sets import register_imagenet, register_shapes_classes
from ..data.loader import TrainLoader
from ..data.panoptic.panoptic_sets import (
    register_ade20k_panoptic,
    register_coco_panoptic,
    register_shapes_panoptic,
)
from ..data.registry import register_coco, register_shapes
from ..data.semantic.label_folders import register_ade20k_sem_seg, register_shapes_sem_seg
from ..heads.prepare import prepare_model
from ..resources import find_config
from . import lazy, lazy_check, yacs, yacs_check, yaml_files
from .arguments import RunArguments, read_own_data
from .data_settings import (
    raise_detections,
    scale_learning_rate,
    settle_conventions,
    with_own_data,
)
from .options import TrainOptions
from .own_data import register
from .settings import Given, Settings
from .solver import Schedule
from .values import ConfigError, raise_problems

# Metadata of a dataset that describes what a model trained on it predicts.
DESCRIPTIONS = (
    *("thing_classes", "stuff_classes", "thing_colors", "stuff_colors", "keypoint_names"),
    *("keypoint_connection_rules", "evaluator_type"),
    *("thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id"),
)


@dataclass(kw_only=True)
class Experiment:
    """The parts of a training; each callable builds one of them.

    Attributes:
        model: builds the model with random weights, on the CPU.
        optimizer: builds the optimizer of a model.
        schedule: length of the training and course of the learning rate.
        train_loader: builds the loader of all training sets.
        test_loaders: build the loader of each test set, by name.
        test_mapper: builds the mapper from an image record to the model's input, as in evaluation.
        options: options of the run.
        config_text: yaml for ``--config-file``, with the user's own data sets.
        settings: batch, data sets, class counts and other settings that depend on data.
        given: settings that the command line overrides.
        with_settings: returns the same experiment with other settings.
        skeleton: builds the model without memory for its weights, and finds problems of its config.
        lr_factors, no_decay_names, layer_decay: arguments of the optimizer that select parameters.
    """

    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    schedule: Schedule
    train_loader: Callable[[], TrainLoader]
    test_loaders: Mapping[str, Callable[[], Any]]
    test_mapper: Callable[[], Callable[[Mapping[str, Any]], dict[str, Any]]]
    options: TrainOptions
    config_text: str
    settings: Settings
    given: Given
    with_settings: Callable[[Settings], "Experiment"]
    skeleton: Callable[[], tuple[nn.Module, list[str]]]
    lr_factors: Mapping[str, float] = field(default_factory=dict)
    no_decay_names: Sequence[str] = ()
    layer_decay: float = 1.0

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the class names in the order of the model, () if they are unknown.

        The names in a COCO file of a registered set are known after the set was read.
        """
        metadata = self.dataset_metadata
        names = [metadata.get(f"{kind}_classes") or () for kind in ("thing", "stuff")]
        return tuple(dict.fromkeys([*names[0], *names[1]]))

    @property
    def dataset_metadata(self) -> dict[str, Any]:
        """Return what Detectron2's metadata says of the classes: ``DESCRIPTIONS``; {} for nothing.

        It is that of the first dataset that names classes.
        """
        for name in (*self.settings.train_sets, *self.settings.test_sets):
            metadata = MetadataCatalog.get(name).as_dict()
            if metadata.get("thing_classes") or metadata.get("stuff_classes"):
                return {key: metadata[key] for key in DESCRIPTIONS if metadata.get(key)}
        return {}


def register_all() -> None:
    """Register every data set that the recipes use."""
    register_coco()
    register_shapes()
    register_shapes_sem_seg()
    register_ade20k_sem_seg()
    register_shapes_panoptic()
    register_coco_panoptic()
    register_ade20k_panoptic()
    register_imagenet()
    register_shapes_classes()


def load_config(path: str | Path, overrides: list[str]) -> Any:
    """Load a config of either kind, and apply overrides.

    Args:
        path: ``.py`` (LazyConfig), ``.yaml`` (yacs), or the ``config.yaml`` that a run has saved;
            also a path below the ``configs`` of the package.
        overrides: ``key=value`` for LazyConfig; ``KEY VALUE`` or ``KEY=VALUE`` for yacs.
    Raises: ValueError if the file is missing or of neither kind, KeyError for an override of a key
        that the config does not have.
    """
    path = find_config(path)
    if not PathManager.isfile(str(path)):
        raise ValueError(f"No such config file: {path}.")
    if path.suffix == ".py":
        return lazy.load_code(path, overrides)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path} is neither a .py (LazyConfig) nor a .yaml (yacs) config.")
    content = yaml_files.read_yaml(path)
    if "model" in content:
        return lazy.load_saved(content, path, overrides)
    return yacs.load(content, path, overrides)


def recipe(path: str | Path) -> Any:
    """Return a LazyConfig of the package, to be changed in a config of one's own.

    Args:
        path: below ``configs``, such as
            ``COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py``.
    Raises: ValueError if there is no such config.
    """
    return load_config(path, [])


def load_config_text(text: str) -> Any:
    """Load the config of a run from the text in its checkpoints.

    Raises: ValueError and KeyError as :func:`load_config`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, [])


def config_reader(cfg: Any) -> Any:
    """Return the module that reads a config: ``lazy`` or ``yacs``."""
    return yacs if isinstance(cfg, CfgNode) else lazy


def read_experiment(cfg: Any, overrides: list[str] | None = None) -> Experiment:
    """Read the parts of a training from a config of either kind.

    Raises: ConfigError or ValueError for invalid values.
    """
    reader = config_reader(cfg)
    settings: Settings = reader.read_settings(cfg)
    return Experiment(
        model=lambda: prepare_model(reader.build_model(cfg)),
        optimizer=partial(reader.build_optimizer, cfg),
        schedule=settings.schedule,
        # Cached: checks and training share the data that was read.
        train_loader=cache(partial(reader.build_train_loader, cfg)),
        test_loaders={
            name: partial(reader.build_test_loader, cfg, name) for name in settings.test_sets
        },
        test_mapper=partial(reader.build_test_mapper, cfg),
        options=settings.options,
        config_text=reader.config_text(cfg),
        settings=settings,
        given=reader.given(overrides or []),
        with_settings=lambda new: read_experiment(reader.write_settings(cfg, new), overrides),
        skeleton=partial(reader.build_skeleton, cfg),
        **reader.optimizer_names(cfg),
    )


def describe(args: RunArguments) -> Experiment:
    """Describe the run of a command line, with checked settings.

    Raises: ValueError, KeyError, TypeError or OSError with advice for the user.
    """
    own_data = read_own_data(args)
    register_all()
    cfg = load_config(args.config_file, args.opts)
    reader = config_reader(cfg)
    given = reader.given(args.opts)
    settings = resolve_settings(checked_settings(cfg), own_data, given)
    changes: dict[str, Any] = {}
    if args.output:
        changes["output_dir"] = args.output
    if args.report:
        changes["report"] = True
    if args.deterministic:
        changes["deterministic"] = True
    settings = replace(settings, options=replace(settings.options, **changes))
    return read_experiment(reader.write_settings(cfg, settings), args.opts)


def checked_settings(cfg: Any) -> Settings:
    """Read and check the settings of a config.

    Raises: ConfigError that names every invalid value.
    """
    reader = config_reader(cfg)
    checker = yacs_check if reader is yacs else lazy_check
    problems = checker.problems(cfg)
    try:
        settings: Settings = reader.read_settings(cfg)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    except (ValueError, TypeError, KeyError):
        # Usually caused by one of these problems, whose message is better.
        raise_problems(problems)
        raise
    raise_problems(problems)
    return settings


def resolve_settings(settings: Settings, own_data: Any, given: Given) -> Settings:
    """Return settings with everything that follows from batch and data.

    The data sets of a saved config are registered, and its settings are kept as saved.
    """
    settings = scale_learning_rate(settings, given)
    if own_data is not None:
        settings = with_own_data(settings, own_data, given)
    elif settings.own_data is not None:
        register(settings.own_data)
    return raise_detections(settle_conventions(settings), given)
