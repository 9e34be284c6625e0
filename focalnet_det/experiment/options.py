"""Define the options of a run once, for both kinds of config."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import torch

from ..checkpoint.fit import LEVEL_MODES
from .values import AT_LEAST_0, AT_LEAST_1, Range, fits, raise_problems, type_name

CHOICES: dict[str, tuple[str, ...]] = {
    "precision": ("bf16", "fp16", "fp32"),
    "period_unit": ("epochs", "iterations"),
    "init_levels": ("", *LEVEL_MODES),
    "on_nan": ("stop", "skip", "rewind"),
    "sharding": ("", "fsdp"),
}
RANGES: dict[str, Range] = {
    "growth_iterations": AT_LEAST_1,
    "recipe_batch": AT_LEAST_0,
    "accumulation": AT_LEAST_1,
    "clip_norm": AT_LEAST_0,
    "clip_value": AT_LEAST_0,
    "ema_decay": Range(0, 0.999999),
    "eval_period": AT_LEAST_0,
    "checkpoint_period": AT_LEAST_0,
    "log_iterations": AT_LEAST_1,
    "keep_checkpoints": AT_LEAST_1,
    "max_dets": AT_LEAST_1,
    "pictures": AT_LEAST_0,
    "nan_limit": AT_LEAST_0,
}
# Option -> key of a yaml config, if Detectron2 has the key; the others follow `yacs_key`.
DETECTRON2_OPTIONS = {
    "output_dir": "OUTPUT_DIR",
    "init_checkpoint": "MODEL.WEIGHTS",
    "device": "MODEL.DEVICE",
    "eval_period": "TEST.EVAL_PERIOD",
    "checkpoint_period": "SOLVER.CHECKPOINT_PERIOD",
    "clip_norm": "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
    "clip_value": "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
    "seed": "SEED",
}
YACS_KEYS = {
    **DETECTRON2_OPTIONS,
    **{
        name: f"TEST.{name.upper()}"
        for name in ("max_dets", "pictures", "boundary_ap", "report", "save_predictions")
    },
}


@dataclass(kw_only=True)
class TrainOptions:
    """Options of a run that do not define the model; the ``train`` section of a LazyConfig.

    Attributes:
        output_dir: folder for all files that the run writes.
        init_checkpoint: initial weights, "" for none.
        init_levels: what to do if these have another number of focal levels: "official",
            "by_kernel", "preserving" or "shrink", see
            ``focalnet_det.checkpoint.load_pretrained``; "" refuses.
        growth_iterations: with init_levels="preserving", iterations in which the global context
            moves to the next level.
        device: "cpu", "cuda", "cuda:N", or "auto" for a GPU if there is one.
        precision: dtype of autocast: "fp32", "bf16" or "fp16".
        recipe_batch: batch size that the learning rate is for, 0 for unknown.
        accumulation: number of parts that the batch is split into, one after another, to save
            memory.
        clip_norm: largest gradient norm, 0 for no clipping.
        clip_value: largest absolute value of a gradient's element, 0 for no clipping.
        ema_decay: decay of an exponential moving average of the weights, which is evaluated and
            written as ``model_ema.pth``; 0 for none.
        eval_period, checkpoint_period: period in ``period_unit``; 0 means at the end only.
        period_unit: "epochs" or "iterations".
        log_iterations: iterations between two progress lines.
        keep_checkpoints: how many of the last checkpoints to keep.
        keep_best: metric of the first test set, such as "segm/AP", that selects the model written
            as ``model_best.pth``; "" for none.
        profile: first and last iteration to profile, () for none.
        wandb_project: project of Weights & Biases, "" for none.
        max_dets: largest number of predictions per image that are evaluated.
        pictures: number of test images to draw at the end, with ground truth and predictions.
        save_predictions: write a PNG for every image, in semantic and panoptic segmentation.
        boundary_ap: evaluate boundary AP in addition to mask AP.
        report: write an HTML page per test set after the last evaluation.
        seed: seed of all random numbers, negative for a different one in each run.
        deterministic: refuse operations that are not reproducible bit by bit on a GPU.
        on_nan: what to do when a loss or a gradient is not finite: "stop"; "skip" the update; or
            "rewind" to the last checkpoint and continue with other batches.
        nan_limit: how often a run may skip or rewind before it stops.
        oom_retry: when memory runs out, retry with activation checkpointing and keep it on (with a
            single process only).
        sharding: "fsdp" divides weights, gradients and the optimizer's state among the processes,
            for models that do not fit otherwise; "" gives each of them all.
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
    deterministic: bool = False
    on_nan: str = "stop"
    nan_limit: int = 10
    oom_retry: bool = False
    sharding: str = ""
    ddp: dict[str, Any] = field(default_factory=dict)

    def to_iterations(self, period: float, iterations_per_epoch: int) -> int:
        """Return a period in iterations."""
        unit = iterations_per_epoch if self.period_unit == "epochs" else 1
        return round(period * unit)

    def __post_init__(self) -> None:
        """Check the fields, and resolve the device "auto".

        Raises: ConfigError that names every invalid field.
        """
        self.profile = tuple(self.profile) if isinstance(self.profile, list) else self.profile
        raise_problems(self.problems())
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def problems(self) -> list[str]:
        """Describe invalid values, one problem per field."""
        kinds = get_type_hints(TrainOptions)
        found = []
        for name, value in vars(self).items():
            if not fits(value, kinds[name]):
                found.append(f"{name} must be {type_name(kinds[name])}, got {value!r}.")
            elif name in CHOICES and value not in CHOICES[name]:
                known = ", ".join(filter(None, CHOICES[name]))
                found.append(f"Unknown {name} {value!r}. Known: {known}.")
            elif name in RANGES and not RANGES[name].holds(value):
                found.append(f"{name} must be {RANGES[name]}, got {value}.")
        if found:
            return found
        window = self.profile or (0, 0)
        if len(window) != 2 or not 0 <= window[0] <= window[1]:
            found.append(f"profile must be (first, last) iterations, got {self.profile}.")
        if self.keep_best and not all(self.keep_best.partition("/")):
            found.append(f'keep_best must be TASK/METRIC, like "segm/AP", got {self.keep_best!r}.')
        return [*found, *self.device_problems()]

    def device_problems(self) -> list[str]:
        """Describe why the device cannot be used."""
        if self.device == "auto":
            return []
        try:
            kind = torch.device(self.device).type
        except RuntimeError:
            kind = ""
        if kind not in ("cpu", "cuda"):
            return [f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}."]
        if kind == "cuda" and not torch.cuda.is_available():
            return ["The config requires a GPU (device cuda), but PyTorch finds none."]
        return []


def default_options() -> dict[str, Any]:
    """Return every option with its default value: the ``train`` section of a LazyConfig."""
    found = {}
    for option in dataclasses.fields(TrainOptions):
        make = option.default_factory
        found[option.name] = option.default if make is dataclasses.MISSING else make()
    return found


def yacs_key(option: str) -> str:
    """Return the key of an option in a yaml config, such as SOLVER.ACCUMULATION."""
    return YACS_KEYS.get(option, f"SOLVER.{option.upper()}")


def option_table() -> str:
    """Return a Markdown table of all options with their keys, for docs/configs.md."""
    entries = re.findall(
        r"^        ([a-z_, ]+): (.*(?:\n            .*)*)", TrainOptions.__doc__ or "", re.M
    )
    texts = {name: text for names, text in entries for name in names.split(", ")}
    rows = ["| `.py` | `.yaml` | |", "|---|---|---|"]
    for name in default_options():
        text = " ".join(texts.get(name, "").split()).replace("``", "`")
        text = text[:1].upper() + text[1:]
        rows.append(f"| `train.{name}` | `{yacs_key(name)}` | {text} |")
    return "\n".join(rows) + "\n"


def own_yacs_options() -> dict[str, Any]:
    """Return {key: default} for the options that Detectron2 has no key for."""
    options = {**default_options(), "period_unit": "iterations"}
    return {yacs_key(k): v for k, v in options.items() if k not in DETECTRON2_OPTIONS}
