"""One description of a training, read from either kind of config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf
from torch import nn
from yaml import YAMLError

from .. import add_focalnet_config
from ..checkpoint.fit import LEVEL_MODES
from ..data.augmentation import POLICIES, evaluation_resize
from ..data.build import TrainLoader, build_test_loader, build_train_loader
from ..data.semantic_augmentation import semantic_crops
from ..heads.mmdet_conventions import MmdetRetinaNet, MmdetROIHeads, MmdetRPN
from ..heads.mmdet_rcnn import MmdetRCNN
from ..heads.prepare import prepare
from .solver import Schedule, adamw

# Of INPUT.POLICY, which then reads INPUT.SEMANTIC_CROPS.
SEMANTIC_CROPS = "semantic_crops"
# Detectron2's registered name: what stands in for it.
MMDET_PARTS = {"RPN": MmdetRPN, "StandardROIHeads": MmdetROIHeads}
MMDET_MODELS = {"GeneralizedRCNN": MmdetRCNN, "RetinaNet": MmdetRetinaNet}


@dataclass(kw_only=True)
class TrainOptions:
    """How to run, apart from what to train; the ``train`` section of a LazyConfig.

    Attributes:
        output_dir: everything that a run writes.
        init_checkpoint: weights to start from, "" for none.
        init_levels: if they have other numbers of focal levels: "official", "by_kernel",
            "preserving" or "shrink", see ``focalnet_det.checkpoint.load_pretrained``; "" refuses.
        growth_iterations: after preserving growth, iterations in which the global context moves to
            the next level.
        device: "auto" takes a GPU if there is one.
        precision: "fp32", "bf16" or "fp16", of autocast.
        recipe_batch: images per iteration that the learning rate was chosen for, 0 for unknown.
        accumulation: parts that the batch is computed in, one after another, to save memory.
        clip_norm: largest gradient norm, 0 for no clipping.
        clip_value: largest absolute value of a gradient's element, 0 for no clipping.
        ema_decay: of the moving average of the weights, which is then what is evaluated and also
            written as ``model_ema.pth``; 0 for none.
        eval_period, checkpoint_period: in ``period_unit``; 0 means at the end only.
        period_unit: "epochs" or "iterations".
        log_iterations: between two progress lines.
        keep_checkpoints: how many of the last checkpoints to keep.
        keep_best: metric of the first test set, such as "segm/AP", by which the best model is kept
            as ``model_best.pth``; "" for none.
        profile: first and last iteration to profile, () for none.
        wandb_project: of Weights & Biases, "" for none.
        max_dets: predictions per image that enter AP.
        pictures: test images to draw at the end, with the truth and what the model finds.
        save_predictions: of semantic and panoptic segmentation, write a PNG of every image.
        boundary_ap: where masks are scored, boundary AP as well.
        report: write an HTML page per test set after the last evaluation.
        seed: of everything random, negative for a different one each time.
        ddp: arguments of DistributedDataParallel.
    """

    output_dir: str = "output"
    init_checkpoint: str = ""
    init_levels: str = ""
    growth_iterations: int = 10_000
    device: str = "auto"
    precision: str = "fp32"
    recipe_batch: int = 0
    accumulation: int = 1
    clip_norm: float = 0.0
    clip_value: float = 0.0
    ema_decay: float = 0.0
    eval_period: float = 1.0
    checkpoint_period: float = 1.0
    period_unit: str = "epochs"
    log_iterations: int = 20
    keep_checkpoints: int = 3
    keep_best: str = ""
    profile: tuple[int, ...] = ()
    wandb_project: str = ""
    max_dets: int = 100
    pictures: int = 6
    report: bool = False
    save_predictions: bool = False
    boundary_ap: bool = False
    seed: int = -1
    ddp: dict[str, Any] = field(default_factory=dict)

    def to_iterations(self, period: float, iterations_per_epoch: int) -> int:
        """A period in iterations."""
        unit = iterations_per_epoch if self.period_unit == "epochs" else 1
        return round(period * unit)

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"Unknown precision {self.precision!r}. Known: bf16, fp16, fp32.")
        if self.period_unit not in ("epochs", "iterations"):
            raise ValueError(f"period_unit must be epochs or iterations, got {self.period_unit!r}.")
        if self.accumulation < 1 or self.keep_checkpoints < 1:
            raise ValueError(
                "accumulation and keep_checkpoints must be 1 or more, got "
                f"{self.accumulation} and {self.keep_checkpoints}."
            )
        if self.init_levels not in ("", *LEVEL_MODES):
            raise ValueError(
                f"Unknown init_levels {self.init_levels!r}. Known: {', '.join(LEVEL_MODES)}."
            )
        if self.growth_iterations < 1:
            raise ValueError(f"growth_iterations must be 1 or more, got {self.growth_iterations}.")
        if len(self.profile) not in (0, 2):
            raise ValueError(f"profile must be () or (first, last), got {self.profile}.")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("The config asks for a GPU (device cuda), but PyTorch sees none here.")


@dataclass(kw_only=True)
class Experiment:
    """The parts of a training, not yet built: each callable builds one."""

    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    schedule: Schedule
    train_loader: Callable[[], TrainLoader]
    test_loaders: Mapping[str, Callable[[], Any]]
    options: TrainOptions
    config_text: str


def load_config(path: str | Path, overrides: list[str]) -> CfgNode | DictConfig:
    """Reads a config of either kind, by its suffix, and applies overrides.

    Args:
        path: ``.py`` (LazyConfig) or ``.yaml`` (yacs).
        overrides: ``key=value`` for LazyConfig; ``KEY VALUE`` or ``KEY=VALUE`` for yacs.
    Raises: ValueError if there is no such file or it is of neither kind, KeyError for an override
        of a key that the config does not have.
    """
    path = Path(path)
    if not PathManager.isfile(str(path)):
        raise ValueError(f"No such config file: {path}.")
    if path.suffix == ".py":
        return apply_lazy_overrides(LazyConfig.load(str(path)), overrides)
    if path.suffix in (".yaml", ".yml"):
        cfg = get_cfg()
        add_focalnet_config(cfg)
        try:
            cfg.merge_from_file(str(path))
        except YAMLError as error:
            raise ValueError(f"{path} is not valid yaml: {error}") from error
        apply_yacs_overrides(cfg, overrides)
        return cfg
    raise ValueError(f"{path} is neither a .py (LazyConfig) nor a .yaml (yacs) config.")


def apply_lazy_overrides(cfg: DictConfig, overrides: list[str]) -> DictConfig:
    """As ``LazyConfig.apply_overrides``, but a key that the config lacks is an error, not news."""
    for item in overrides:
        key, equals, _ = item.partition("=")
        key = key.lstrip("+~")
        if not equals:
            raise ValueError(f"Overrides of a .py config read key=value, got {item!r}.")
        parent, _, leaf = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        # A call may take more arguments than its config spells out; anything else is a typo.
        if not item.startswith("+") and (
            not OmegaConf.is_config(node) or (leaf not in node and "_target_" not in node)
        ):
            raise KeyError(f"The config has no key {key!r}.")
    from hydra.errors import HydraException

    try:
        return LazyConfig.apply_overrides(cfg, [item.lstrip("+") for item in overrides])
    except HydraException as error:
        raise ValueError(
            f"Override not understood (a value with = or brackets needs quotes of its own): {error}"
        ) from error


def apply_yacs_overrides(cfg: CfgNode, overrides: list[str]) -> None:
    """As ``merge_from_list``, with KeyError and ValueError in place of failed assertions."""
    items = iter(overrides)
    for item in items:
        key, equals, rest = item.partition("=")
        value = rest if equals else next(items, None)
        if value is None:
            raise ValueError(
                f"Overrides of a .yaml config read KEY VALUE or KEY=VALUE; {key!r} has no value."
            )
        node = cfg
        for part in key.split("."):
            if not isinstance(node, CfgNode) or part not in node:
                raise KeyError(f"The config has no key {key!r}.")
            node = node[part]
        cfg.merge_from_list([key, value])


def read_experiment(cfg: CfgNode | DictConfig) -> Experiment:
    """The parts of a training from a config of either kind."""
    return from_yacs(cfg) if isinstance(cfg, CfgNode) else from_lazy(cfg)


def from_lazy(cfg: DictConfig) -> Experiment:
    """Reads ``model``, ``optimizer``, ``schedule``, ``dataloader`` and ``train``."""

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        node = cfg.optimizer.copy()
        node.model = model
        return instantiate(node)

    def test_loader(node: DictConfig) -> Callable[[], Any]:
        return lambda: instantiate(node)

    tests = cfg.dataloader.get("test", None) or []
    return Experiment(
        model=lambda: prepare(instantiate(cfg.model)),
        optimizer=optimizer,
        schedule=instantiate(cfg.schedule),
        train_loader=lambda: instantiate(cfg.dataloader.train),
        test_loaders={node.dataset: test_loader(node) for node in tests},
        options=TrainOptions(
            **cast(dict[str, Any], OmegaConf.to_container(cfg.train, resolve=True))
        ),
        config_text=lazy_text(cfg),
    )


def from_yacs(cfg: CfgNode) -> Experiment:
    """Reads Detectron2's keys and those of ``add_focalnet_config``."""
    solver = cfg.SOLVER

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        if solver.OPTIMIZER == "SGD":
            return build_optimizer(cfg, model)
        if solver.OPTIMIZER == "ADAMW":
            return adamw(
                model,
                lr=solver.BASE_LR,
                weight_decay=solver.WEIGHT_DECAY,
                no_decay_names=solver.NO_DECAY_NAMES,
                lr_factors={"backbone.bottom_up": solver.BACKBONE_MULTIPLIER},
                layer_decay=solver.LAYER_DECAY,
            )
        raise ValueError(f"Unknown SOLVER.OPTIMIZER {solver.OPTIMIZER!r}. Known: ADAMW, SGD.")

    def model() -> nn.Module:
        frozen = cfg.clone()
        frozen.MODEL.DEVICE = "cpu"  # the engine moves it
        apply_conventions(frozen)
        return prepare(build_model(frozen))

    def test_loader(name: str) -> Callable[[], Any]:
        def resize(short_side: int, max_long_side: int) -> list[Any]:
            return evaluation_resize(
                short_side=short_side, max_long_side=max_long_side, antialias=cfg.INPUT.ANTIALIAS
            )

        test_time, input_ = cfg.TEST.AUG, cfg.INPUT
        sides = test_time.MIN_SIZES if test_time.ENABLED else ()
        return lambda: build_test_loader(
            dataset=name,
            augmentations=resize(input_.MIN_SIZE_TEST, input_.MAX_SIZE_TEST),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            image_format=input_.FORMAT,
            views=[resize(side, test_time.MAX_SIZE) for side in sides],
            flip=test_time.ENABLED and test_time.FLIP,
        )

    return Experiment(
        model=model,
        optimizer=optimizer,
        schedule=yacs_schedule(solver),
        train_loader=lambda: yacs_train_loader(cfg),
        test_loaders={name: test_loader(name) for name in cfg.DATASETS.TEST},
        options=yacs_options(cfg),
        config_text=cfg.dump(),
    )


def apply_conventions(cfg: CfgNode) -> None:
    """Names the parts that ``MODEL.CONVENTIONS`` asks for.

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


def yacs_schedule(solver: CfgNode) -> Schedule:
    """``SOLVER.EPOCHS`` with ``EPOCH_STEPS``, or Detectron2's ``MAX_ITER`` with ``STEPS``."""
    decays = {
        "WarmupMultiStepLR": "multistep",
        "WarmupCosineLR": "cosine",
        "WarmupPolyLR": "poly",  # of power 1
    }
    if solver.LR_SCHEDULER_NAME not in decays:
        raise ValueError(
            f"Unknown SOLVER.LR_SCHEDULER_NAME {solver.LR_SCHEDULER_NAME!r}. "
            f"Known: {', '.join(decays)}."
        )
    in_epochs = solver.EPOCHS > 0
    return Schedule(
        epochs=solver.EPOCHS if in_epochs else None,
        iterations=None if in_epochs else solver.MAX_ITER,
        decay=decays[solver.LR_SCHEDULER_NAME],
        milestones=tuple(solver.EPOCH_STEPS if in_epochs else solver.STEPS),
        gamma=solver.GAMMA,
        warmup_iterations=solver.WARMUP_ITERS,
        warmup_factor=solver.WARMUP_FACTOR,
    )


def yacs_augmentations(node: CfgNode) -> list[Any]:
    """Training augmentation of a yacs config's ``INPUT``.

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


def yacs_train_loader(cfg: CfgNode) -> TrainLoader:
    """Training data of a yacs config."""
    return build_train_loader(
        datasets=cfg.DATASETS.TRAIN,
        augmentations=yacs_augmentations(cfg.INPUT),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        masks=cfg.MODEL.MASK_ON,
        keypoints=cfg.MODEL.KEYPOINT_ON,
        image_format=cfg.INPUT.FORMAT,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
    )


def yacs_options(cfg: CfgNode) -> TrainOptions:
    """Run options of a yacs config; its periods are in iterations."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    # With SGD, Detectron2 builds the clipping into the optimizer.
    limit = clip.CLIP_VALUE if clip.ENABLED and cfg.SOLVER.OPTIMIZER == "ADAMW" else 0.0
    precision = "fp16" if cfg.SOLVER.AMP.ENABLED else cfg.SOLVER.PRECISION
    return TrainOptions(
        output_dir=cfg.OUTPUT_DIR,
        init_checkpoint=cfg.MODEL.WEIGHTS,
        init_levels=cfg.SOLVER.INIT_LEVELS,
        growth_iterations=cfg.SOLVER.GROWTH_ITERATIONS,
        # Detectron2's default is "cuda", also where there is none: no one has asked for it.
        device="auto" if cfg.MODEL.DEVICE == "cuda" else cfg.MODEL.DEVICE,
        precision=precision,
        eval_period=cfg.TEST.EVAL_PERIOD,
        checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
        period_unit="iterations",
        recipe_batch=cfg.SOLVER.RECIPE_BATCH,
        accumulation=cfg.SOLVER.ACCUMULATION,
        clip_norm=0.0 if clip.CLIP_TYPE == "value" else limit,
        clip_value=limit if clip.CLIP_TYPE == "value" else 0.0,
        ema_decay=cfg.SOLVER.EMA_DECAY,
        keep_checkpoints=cfg.SOLVER.KEEP_CHECKPOINTS,
        keep_best=cfg.SOLVER.KEEP_BEST,
        log_iterations=cfg.SOLVER.LOG_ITERATIONS,
        max_dets=cfg.TEST.MAX_DETS,
        pictures=cfg.TEST.PICTURES,
        boundary_ap=cfg.TEST.BOUNDARY_AP,
        report=cfg.TEST.REPORT,
        seed=cfg.SEED,
    )


def lazy_text(cfg: DictConfig) -> str:
    """A LazyConfig as yaml, with callables by name."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        LazyConfig.save(cfg, str(path))
        return path.read_text()
