"""Check a run before its first step, in seconds, and report all problems in one error."""

import importlib.util
import inspect
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..backbones.stages import StagedBackbone
from ..checkpoint import check_file
from ..data.check_dataset import check_dataset
from ..data.loader import TrainLoader, check_masks, dataset_records
from .data_settings import KIND_OF_EVALUATOR
from .description import Experiment
from .length import shorten_warmup
from .model_check import channel_problems, class_problems, feature_problems
from .settings import Settings
from .sharding_check import sharding_problems
from .values import ConfigError, raise_problems

# Patterns of metric names by task; "-NAME" selects a class.
COCO_METRIC = r"AP(50|75|s|m|l)?|AR(\d+|s|m|l)|AP-(?P<name>.+)"
METRICS = {
    "bbox": COCO_METRIC,
    "segm": COCO_METRIC,
    "boundary": COCO_METRIC,
    "keypoints": COCO_METRIC,
    "sem_seg": r"mIoU|fwIoU|mACC|pACC|mBIoU|(IoU|ACC|BIoU)-(?P<name>.+)",
    "classification": r"top1|top5|mean_top1|top1-(?P<name>.+)",
    "masked_images": r"L1",
    "panoptic_seg": r"(PQ|SQ|RQ)(_th|_st)?|(PQ|SQ|RQ)-(?P<name>.+)",
}
TASKS = {
    "coco": ("bbox", "segm", "keypoints", "boundary"),
    "panoptic": ("bbox", "segm", "boundary", "sem_seg", "panoptic_seg"),
    "labels": ("sem_seg",),
    "classes": ("classification",),
    "unlabeled": ("masked_images",),
}
# Elements of a checkpoint per parameter (weight and AdamW's two moments), and their size in bytes.
COPIES, BYTES = 3, 4


def check(experiment: Experiment, *, eval_only: bool = False) -> Experiment:
    """Check an experiment, and return it with its schedule fitted to its data.

    The model is built without memory for its weights, the data is read, and names, class counts,
    lengths and disk space are compared with them.

    Raises: ConfigError with every problem; errors of the data and of the parts that are built.
    """
    model, problems = skeleton(experiment)
    problems += [
        *class_problems(experiment.settings, model),
        *option_problems(experiment),
        *channel_problems(model),
        *feature_problems(model),
        *file_problems(experiment.options.init_checkpoint),
    ]
    if not eval_only:
        problems += [
            *batch_problems(experiment),
            *sharding_problems(experiment, model),
            *metric_problems(experiment.settings),
            *name_problems(experiment, model),
            *mixing_problems(experiment, model),
            *disk_problems(experiment, model),
        ]
    raise_problems(problems)
    check_data(experiment.settings, eval_only=eval_only)
    if not eval_only:
        experiment = fit_to_data(experiment)
    for name, build in experiment.test_loaders.items():
        build_part(build, f"The loader of {name}")
    raise_problems(weight_problems(experiment, eval_only=eval_only))
    return experiment


def check_data(settings: Settings, *, eval_only: bool) -> None:
    """Read every data set of a run: all rows, and a sample of the images.

    The user's own data sets were read when they were registered.

    Raises: the error of a set; ConfigError or FileNotFoundError with all messages for several.
    """
    errors: list[Exception] = []
    for names, evaluation in ((settings.train_sets, False), (settings.test_sets, True)):
        for name in () if eval_only and not evaluation else names:
            masks = bool(settings.masks)
            try:
                if not MetadataCatalog.get(name).get("own_data", False):
                    check_dataset(name, evaluation=evaluation, masks=masks)
                elif masks:
                    records = dataset_records([name], filter_empty=False)
                    check_masks(name, records, evaluation=evaluation)
            except (ValueError, KeyError, OSError) as error:
                errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors and all(isinstance(error, FileNotFoundError) for error in errors):
        raise FileNotFoundError("\n".join(map(str, errors)))
    raise_problems([str(error) for error in errors])


def skeleton(experiment: Experiment) -> tuple[nn.Module, list[str]]:
    """Build the model without memory for its weights, and an optimizer to check its arguments.

    Returns: the model, and problems such as keys that nothing reads.
    Raises: ConfigError if model or optimizer cannot be built.
    """
    with torch.random.fork_rng(devices=[]):
        model, problems = cast(
            tuple[nn.Module, list[str]], build_part(experiment.skeleton, "The model")
        )
        build_part(lambda: experiment.optimizer(model), "The optimizer")
    return model, problems


def build_part(build: Callable[[], object], what: str) -> object:
    """Build a part, and turn unexpected errors into a ConfigError that names the part.

    Raises: ValueError, KeyError, OSError or ImportError as the part does, otherwise ConfigError.
    """
    try:
        return build()
    except (ValueError, KeyError, OSError, ImportError):
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError([f"{what} cannot be built: {text}"]) from error


def weight_problems(experiment: Experiment, *, eval_only: bool) -> list[str]:
    """Describe weights of this package that were trained for other classes than those of the data.

    Files of other libraries do not contain class names. Training may start from weights for another
    number of classes, because the last layers are then initialized again.
    """
    path = Path(experiment.options.init_checkpoint)
    if not experiment.options.init_checkpoint or not path.is_file():
        return []
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # loading the weights reports what is wrong with the file
        return []
    trained = content.get("class_names") if isinstance(content, dict) else None
    names = experiment.class_names
    if not trained or not names or tuple(trained) == names:
        return []
    if not eval_only and len(trained) != len(names):
        return []
    differing = [(a, b) for a, b in zip(trained, names, strict=False) if a != b]
    more = names[len(trained) :] or trained[len(names) :]
    example = (
        f"class {differing[0][0]!r} is {differing[0][1]!r} in the data" if differing else f"{more}"
    )
    return [
        f"The weights of {path} were trained for {len(trained)} classes that differ from the "
        f"{len(names)} of the data ({example}). Classes are matched by position: use the names "
        "and the order of the training."
    ]


def file_problems(weights: str) -> list[str]:
    """Describe what is wrong with a file of initial weights; names and URLs are resolved later."""
    path = Path(weights)
    if not weights or not path.is_file():
        return []
    problem = check_file(path)
    return [] if problem is None else [f"Could not read {weights}: {problem}."]


def option_problems(experiment: Experiment) -> list[str]:
    """Describe options of the run that cannot work on this machine."""
    options, key, found = experiment.options, experiment.given.key, []
    device = torch.device(options.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        found.append(f"{key('device')} is {device}, but PyTorch finds {count} GPUs.")
    if options.wandb_project and importlib.util.find_spec("wandb") is None:
        found.append(f"{key('wandb_project')} needs Weights & Biases: pip install wandb.")
    unknown = set(options.ddp) - set(inspect.signature(DistributedDataParallel).parameters)
    if unknown:
        names = ", ".join(sorted(map(str, unknown)))
        found.append(f"{key('ddp')}: DistributedDataParallel has no argument {names}.")
    folder = Path(options.output_dir)
    if any(p.exists() and not p.is_dir() for p in (folder, *folder.parents)):
        found.append(f"{key('output_dir')} {folder} is not a folder.")
    return found


def batch_problems(experiment: Experiment) -> list[str]:
    """Describe a batch that cannot be split evenly over processes or accumulation steps."""
    options, settings, key = experiment.options, experiment.settings, experiment.given.key
    processes = comm.get_world_size()
    per_process, rest = divmod(settings.batch_size, processes)
    if rest:
        return [
            f"A batch of {settings.batch_size} images cannot be split over {processes} processes: "
            f"change {key('batch_size')}."
        ]
    if per_process % options.accumulation:
        return [
            f"A batch of {per_process} images per process cannot be accumulated in "
            f"{options.accumulation} parts: change {key('accumulation')} or {key('batch_size')}."
        ]
    return []


def mixing_problems(experiment: Experiment, model: nn.Module) -> list[str]:
    """Return that a classifier mixes pairs of images, but gets an odd number of them."""
    options, settings = experiment.options, experiment.settings
    together = settings.batch_size / comm.get_world_size() / options.accumulation
    if not getattr(model, "mixes", False) or together % 2 == 0:
        return []
    return [
        f"Mixup and CutMix pair the images of a batch, {together:g} at a time here: make them even "
        f"({experiment.given.key('batch_size')}), or set model.mixup=0 and model.cutmix=0."
    ]


def metric_problems(settings: Settings) -> list[str]:
    """Describe a ``keep_best`` that is not a metric of the first test set."""
    metric = settings.options.keep_best
    if not metric:
        return []
    if not settings.test_sets:
        return [f"keep_best {metric} needs a test set to evaluate on."]
    metadata = MetadataCatalog.get(settings.test_sets[0])
    kind = KIND_OF_EVALUATOR.get(metadata.get("evaluator_type", ""))
    if kind is None:
        return []
    task, _, name = metric.partition("/")
    tasks = [t for t in TASKS[kind] if t != "boundary" or settings.options.boundary_ap]
    if settings.masks is False:
        tasks = [t for t in tasks if t not in ("segm", "boundary")]
    if kind == "coco" and settings.model.keypoints is None:
        tasks.remove("keypoints")
    known = ", ".join(f"{t}/{METRICS[t].split('|')[0].split('(')[0]}" for t in tasks)
    known = known.replace("panoptic_seg/", "panoptic_seg/PQ")
    match = re.fullmatch(METRICS.get(task, ""), name) if task in tasks else None
    classes = {*(metadata.get("thing_classes") or ()), *(metadata.get("stuff_classes") or ())}
    named = match.group("name") if match else None
    if match is None or (named is not None and classes and named not in classes):
        return [
            f"keep_best {metric} is not a metric of {settings.test_sets[0]}. Known: {known}, ..."
        ]
    return []


def name_problems(experiment: Experiment, model: nn.Module) -> list[str]:
    """Describe parts of names that match no parameter, and factors without effect."""
    names = [name for name, _ in model.named_parameters()]
    given, found = experiment.given, []
    for part in experiment.lr_factors:
        if not any(part in name for name in names):
            found.append(f"{given.key('lr_factors')}: no parameter has {part!r} in its name.")
    for part in experiment.no_decay_names if "no_decay_names" in given else ():
        if not any(part in name for name in names):
            found.append(f"{given.key('no_decay_names')}: no parameter has {part!r} in its name.")
    focal = any(isinstance(module, StagedBackbone) for module in model.modules())
    if experiment.layer_decay != 1 and not focal:
        found.append("layer_decay has no effect: the model has no focal network.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        found.append("Every parameter is frozen: there is nothing to train.")
    return found


def disk_problems(experiment: Experiment, model: nn.Module) -> list[str]:
    """Describe a lack of disk space for the checkpoints, estimated from the parameters."""
    options = experiment.options
    size = sum(p.numel() for p in model.parameters()) * BYTES
    averaged = size if options.ema_decay else 0
    best = size if options.keep_best else 0
    # The last checkpoints, the final one, and one that is being written.
    needed = (options.keep_checkpoints + 2) * (COPIES * size + averaged) + best + averaged
    folder = Path(options.output_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed <= free:
        return []
    return [
        f"The checkpoints need about {needed / 2**30:.1f} GiB, but {folder} has only "
        f"{free / 2**30:.1f} GiB left: free some disk space, choose another folder (--output), or "
        f"lower {experiment.given.key('keep_checkpoints')}."
    ]


def fit_to_data(experiment: Experiment) -> Experiment:
    """Fit the warm-up of an experiment to the length of its training, and check its periods.

    Raises: ConfigError if an overridden warm-up, milestone or period exceeds the training;
        ValueError or OSError of the training data.
    """
    if not experiment.settings.train_sets:
        raise ConfigError(["There is no training set: name one, or add --eval-only to evaluate."])
    loader = cast(TrainLoader, build_part(experiment.train_loader, "The training loader"))
    per_epoch, given = loader.iterations_per_epoch, experiment.given
    schedule, options = experiment.schedule, experiment.options
    problems = [
        *length_problems(experiment, per_epoch),
        *profile_problems(experiment, schedule.max_iter(per_epoch)),
    ]
    raise_problems(problems)
    shortened = shorten_warmup(schedule, per_epoch, given)
    if shortened == schedule:
        return experiment
    settings = replace(experiment.settings, schedule=shortened, options=options)
    return experiment.with_settings(settings)


def length_problems(experiment: Experiment, per_epoch: int) -> Sequence[str]:
    """Describe overridden milestones and periods that the training never reaches."""
    schedule, options, given = experiment.schedule, experiment.options, experiment.given
    unit = "iterations" if schedule.epochs is None else "epochs"
    found = []
    late = [m for m in schedule.milestones if m >= schedule.length]
    if late and "milestones" in given and schedule.decay == "multistep":
        found.append(
            f"{given.key('milestones')}: {late[0]:g} {unit} is not within the training of "
            f"{schedule.length:g} {unit}."
        )
    if "milestones" in given and list(schedule.milestones) != sorted(schedule.milestones):
        milestones = list(schedule.milestones)
        found.append(f"{given.key('milestones')} must be in ascending order, got {milestones}.")
    if "milestones" in given and schedule.decay != "multistep":
        found.append(f"{given.key('milestones')} has no effect on a {schedule.decay} schedule.")
    total = schedule.max_iter(per_epoch)
    for name in ("eval_period", "checkpoint_period"):
        period = options.to_iterations(getattr(options, name), per_epoch)
        if name in given and period > total:
            found.append(
                f"{given.key(name)} of {getattr(options, name):g} {options.period_unit} is longer "
                f"than the training of {total} iterations: shorten it, change "
                f"{given.key('period_unit')}, or set it to 0 for the end only."
            )
    return found


def profile_problems(experiment: Experiment, total: int) -> list[str]:
    """Describe iterations to profile that begin after the end of the training."""
    profile = experiment.options.profile
    if not profile or profile[0] < total:
        return []
    key = experiment.given.key("profile")
    return [f"{key} begins at iteration {profile[0]}, after the last of {total}."]
