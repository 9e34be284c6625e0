"""Check the command line of tools/train_net.py, and read the user's data sets that it names."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .own_data import OwnData, OwnSet
from .values import raise_problems


@dataclass(kw_only=True)
class RunArguments:
    """The command line of tools/train_net.py; see its ``--help``."""

    config_file: str
    opts: list[str] = field(default_factory=list)
    resume: bool = False
    eval_only: bool = False
    output: str | None = None
    report: bool = False
    overwrite: bool = False
    deterministic: bool = False
    coco_json: Sequence[str] = ()
    images: Sequence[str] = ()
    val_json: Sequence[str] = ()
    val_images: Sequence[str] = ()
    panoptic_json: Sequence[str] = ()
    panoptic_root: Sequence[str] = ()
    val_panoptic_json: Sequence[str] = ()
    val_panoptic_root: Sequence[str] = ()
    sem_images: Sequence[str] = ()
    sem_labels: Sequence[str] = ()
    val_sem_images: Sequence[str] = ()
    val_sem_labels: Sequence[str] = ()
    class_images: Sequence[str] = ()
    val_class_images: Sequence[str] = ()
    unlabeled_images: Sequence[str] = ()
    val_unlabeled_images: Sequence[str] = ()
    classes: str | None = None
    first_label: int | None = None
    num_gpus: int = 1
    num_cpus: int = 0
    num_machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"


# Option -> the options of which it needs at least one.
REQUIRED_OPTIONS = {
    "images": ("coco_json", "panoptic_json"),
    "val_images": ("val_json", "val_panoptic_json"),
    "panoptic_root": ("panoptic_json",),
    "val_panoptic_root": ("val_panoptic_json",),
    "classes": (
        *("sem_images", "sem_labels", "val_sem_images", "val_sem_labels"),
        *("class_images", "val_class_images"),
    ),
    "first_label": ("classes",),
}
# Kind of data -> the options that name its training and validation sets.
KINDS = {
    "coco": (("coco_json",), ("val_json",)),
    "panoptic": (("panoptic_json",), ("val_panoptic_json",)),
    "labels": (("sem_images", "sem_labels"), ("val_sem_images", "val_sem_labels")),
    "classes": (("class_images",), ("val_class_images",)),
    "unlabeled": (("unlabeled_images",), ("val_unlabeled_images",)),
}


def option(name: str) -> str:
    """Return an option as written on the command line."""
    return f"--{name.replace('_', '-')}"


def check_arguments(args: RunArguments) -> None:
    """Check that options neither contradict each other nor have no effect.

    Raises: ConfigError with every problem.
    """
    problems = []
    if args.eval_only and args.resume:
        problems.append(
            "--eval-only and --resume contradict each other: name the weights to evaluate instead "
            "(train.init_checkpoint=FILE, or MODEL.WEIGHTS FILE with a yaml config)."
        )
    if args.overwrite and args.resume:
        problems.append("--overwrite deletes the run that --resume continues: remove one of them.")
    if args.overwrite and args.eval_only:
        problems.append("--overwrite has no effect with --eval-only, which deletes nothing.")
    for name, companions in REQUIRED_OPTIONS.items():
        if getattr(args, name) not in (None, (), []) and not _any(args, companions):
            needed = " or ".join(map(option, companions))
            problems.append(f"{option(name)} has no effect without {needed}.")
    kinds = [kind for kind, (train, val) in KINDS.items() if _any(args, (*train, *val))]
    if len(kinds) > 1:
        named = [option(n) for kind in kinds for n in (*KINDS[kind][0], *KINDS[kind][1])]
        used = [o for o in named if _any(args, (o.strip("-").replace("-", "_"),))]
        problems.append(f"A run uses one kind of data, but got {', '.join(used)}.")
    for kind in kinds:
        train, val = KINDS[kind]
        if not _any(args, train) and not args.eval_only:
            given = " and ".join(option(n) for n in val if _any(args, (n,)))
            problems.append(
                f"{given} without {' and '.join(map(option, train))}: there is no training set. "
                "To evaluate only, add --eval-only."
            )
    raise_problems(problems)


def _any(args: RunArguments, names: Sequence[str]) -> bool:
    return any(getattr(args, name) for name in names)


def read_own_data(args: RunArguments) -> OwnData | None:
    """Return the user's data sets that a command line names, None if it names none.

    Raises: ConfigError or ValueError if options are missing or contradict each other.
    """
    check_arguments(args)
    if args.coco_json or args.val_json:
        train = pair_coco_files("coco-json", args.coco_json, args.images)
        val = pair_coco_files("val-json", args.val_json, args.val_images or args.images)
        return OwnData(kind="coco", train=train, val=val)
    if args.panoptic_json or args.val_panoptic_json:
        train = pair_panoptic_files("", args.panoptic_json, args.panoptic_root, args.images)
        images = args.val_images or args.images
        val = pair_panoptic_files("val-", args.val_panoptic_json, args.val_panoptic_root, images)
        return OwnData(kind="panoptic", train=train, val=val)
    for kind in ("classes", "unlabeled"):
        given = [getattr(args, names[0]) for names in KINDS[kind]]
        if any(given):
            train, val = (tuple(OwnSet(labels="", images=path) for path in row) for row in given)
            return OwnData(kind=kind, train=train, val=val, classes=args.classes)
    pairs = (args.sem_images, args.sem_labels), (args.val_sem_images, args.val_sem_labels)
    if not any(map(any, pairs)):
        return None
    rows = []
    for prefix, (images, labels) in zip(("sem", "val-sem"), pairs, strict=True):
        if len(images) != len(labels):
            raise ValueError(
                f"Each --{prefix}-images DIR needs --{prefix}-labels DIR: {len(images)} image "
                f"folders, {len(labels)} label folders."
            )
        rows.append(tuple(OwnSet(labels=b, images=a) for a, b in zip(images, labels, strict=True)))
    if args.classes is None:
        raise ValueError("Label folders need --classes FILE, with one class name per line.")
    train, val = rows
    return OwnData(
        kind="labels", train=train, val=val, classes=args.classes, first_label=args.first_label
    )


def pair_coco_files(option: str, files: Sequence[str], images: Sequence[str]) -> tuple[OwnSet, ...]:
    """Pair COCO files with their image folders.

    Args:
        option: option that names the files, for messages.
        files: annotation files.
        images: one image folder per file.
    Raises: ValueError if their numbers differ.
    """
    images = images if files else ()
    if len(files) != len(images):
        raise ValueError(
            f"Each --{option} FILE needs --images DIR: {len(files)} files, {len(images)} folders."
        )
    return tuple(OwnSet(labels=a, images=b) for a, b in zip(files, images, strict=True))


def pair_panoptic_files(
    prefix: str, jsons: Sequence[str], roots: Sequence[str], images: Sequence[str]
) -> tuple[OwnSet, ...]:
    """Pair panoptic files with their folders.

    Args:
        prefix: "val-" for validation sets, otherwise "", for messages.
        jsons: panoptic JSON files.
        roots: one folder of PNGs per file; empty for :func:`default_png_folder` of each.
        images: one image folder per file.
    Raises: ValueError if their numbers differ, or there is no default folder.
    """
    roots = roots or [default_png_folder(path) for path in jsons]
    images = images if jsons else ()
    if not len(jsons) == len(roots) == len(images):
        raise ValueError(
            f"Each --{prefix}panoptic-json FILE needs --{prefix}panoptic-root DIR and "
            f"--{prefix}images DIR: {len(jsons)} files, {len(roots)} PNG folders, {len(images)} "
            "image folders."
        )
    rows = zip(jsons, images, roots, strict=True)
    return tuple(OwnSet(labels=a, images=b, segments=c) for a, b, c in rows)


def default_png_folder(panoptic_json: str) -> str:
    """Return the PNG folder of a panoptic JSON as in COCO's archives.

    It has the name of the JSON without suffix, next to it or to its folder.

    Raises: ValueError if there is no such folder.
    """
    path = Path(panoptic_json)
    for parent in (path.parent, path.parent.parent):
        if (parent / path.stem).is_dir():
            return str(parent / path.stem)
    raise ValueError(
        f"There is no PNG folder {path.stem} next to {path} or its folder: name it with "
        "--panoptic-root or --val-panoptic-root."
    )
