"""Register folders and archives of images: a folder per class, or no labels at all."""

import errno
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from detectron2.data import MetadataCatalog

from ..io.open_image import image_suffixes
from ..issue_policies import EMPTY_CLASS, report_issues
from ..registry import check_images, register_or_replace
from .archives import SUFFIXES, archive_members

logger = logging.getLogger("focalnet_det")

CLASSIFICATION, UNLABELED = "classification", "unlabeled"
Record = dict[str, Any]


def is_archive(source: str | Path) -> bool:
    """Tell whether a path is that of a tar or zip archive, by its suffix."""
    return Path(source).suffix.lower() in SUFFIXES


def list_images(source: str | Path) -> list[tuple[str, str]]:
    """Return (path inside, path) of each image below a folder or in an archive, sorted.

    Args:
        source: folder, ``.tar`` or ``.zip``; hidden files do not count.
    Raises: FileNotFoundError if it does not exist, ValueError as :func:`archive_members`.
    """
    source = Path(source)
    if not source.exists():
        raise FileNotFoundError(errno.ENOENT, "No such folder or archive", str(source))
    if is_archive(source) and source.is_file():
        rows = list(archive_members(source))
    else:
        rows = [
            (Path(folder, name).relative_to(source).as_posix(), str(Path(folder, name)))
            for folder, _, names in os.walk(source, followlinks=True)
            for name in names
        ]
    known = image_suffixes()
    images = [
        row
        for row in rows
        if PurePosixPath(row[0]).suffix.lower() in known
        and not any(part.startswith(".") for part in PurePosixPath(row[0]).parts)
    ]
    return sorted(images)


def class_folders(source: str | Path) -> dict[str, list[str]]:
    """Return the images of each class, by the name of its folder.

    Folders around all classes of an archive, such as ``train``, do not count. A folder without
    images is a class without images.

    Raises: as :func:`list_images`; ValueError if there is no class, or an image outside of one.
    """
    images = list_images(source)
    parts = [(PurePosixPath(inside).parts, path) for inside, path in images]
    if is_archive(source):
        while parts and min(len(p) for p, _ in parts) > 2 and len({p[0] for p, _ in parts}) == 1:
            parts = [(p[1:], path) for p, path in parts]
        folders: dict[str, list[str]] = {}
    else:
        entries = sorted(Path(source).iterdir())
        folders = {p.name: [] for p in entries if p.is_dir() and not p.name.startswith(".")}
    for names, path in parts:
        if len(names) < 2:
            raise ValueError(
                f"{source} holds {path} outside of a class: put the images of each class into a "
                "folder that has its name."
            )
        folders.setdefault(names[0], []).append(path)
    if not folders or not any(folders.values()):
        raise ValueError(
            f"{source} has no images in class folders: it needs a folder per class with its images."
        )
    return dict(sorted(folders.items()))


def class_records(
    source: str | Path, classes: Sequence[str] | None = None
) -> tuple[tuple[str, ...], list[Record], Counter[str]]:
    """Return classes, records and issues of class folders.

    Args:
        source: see :func:`class_folders`.
        classes: names of the folders in the order of the model's outputs; None for sorted ones.
    Returns: classes; records with "file_name", "image_id" and "label"; {issue: count}.
    Raises: as :func:`class_folders`; ValueError for a folder that is not among the classes.
    """
    folders = class_folders(source)
    names = tuple(folders if classes is None else classes)
    unknown = sorted(set(folders) - set(names))
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(
            f"{source} has folders that are not among the {len(names)} classes: "
            f"{', '.join(unknown[:3])}{more}. Classes are the folders of the first training set, "
            "or those of --classes."
        )
    labeled = [(path, k) for k, name in enumerate(names) for path in folders.get(name, ())]
    records = [
        {"file_name": path, "image_id": index, "label": label}
        for index, (path, label) in enumerate(labeled)
    ]
    issues = Counter({EMPTY_CLASS: sum(not folders.get(name) for name in names)})
    return names, records, +issues


def register_class_folders(
    name: str,
    source: str | Path,
    classes: Sequence[str] | None = None,
    *,
    evaluation: bool = False,
) -> tuple[tuple[str, ...], int]:
    """Register class folders, and check a sample of their images.

    Args:
        name: name in Detectron2's catalogs; an existing dataset of this name is replaced.
        source, classes: see :func:`class_records`.
        evaluation: apply the stricter rules of evaluation.
    Returns: the classes, and the number of images.
    Raises: as :func:`class_records`; DataError with all errors of the sample.
    """
    names, records, issues = class_records(source, classes)
    check_images(source, records, evaluation=evaluation)
    report_issues(source, issues, evaluation=evaluation)
    register_or_replace(name, lambda: records)
    MetadataCatalog.get(name).set(
        evaluator_type=CLASSIFICATION,
        image_root=str(source),
        thing_classes=list(names),
        file_issues=dict(issues),
    )
    return names, len(records)


def register_classes_lazily(
    name: str, source: Callable[[], Path], classes: Callable[[], Sequence[str]] | None = None
) -> None:
    """Register class folders that are listed when their records are first requested.

    Args:
        name: name in Detectron2's catalogs; an existing dataset of this name is replaced.
        source: returns the folder or archive.
        classes: returns the classes, see :func:`class_records`; None for sorted folders.
    """

    def records() -> list[Record]:
        found, rows, issues = class_records(source(), None if classes is None else classes())
        # `Metadata.set` rejects changed values, but the folders may have changed since.
        described = {"thing_classes": list(found), "file_issues": dict(issues)}
        vars(MetadataCatalog.get(name)).update(described)
        return rows

    register_or_replace(name, records)
    MetadataCatalog.get(name).set(evaluator_type=CLASSIFICATION)


def unlabeled_records(source: str | Path) -> list[Record]:
    """Return the records of all images below a folder or in an archive.

    Raises: as :func:`list_images`; ValueError if there are none.
    """
    images = list_images(source)
    if not images:
        raise ValueError(f"{source} holds no images.")
    return [{"file_name": path, "image_id": k} for k, (_, path) in enumerate(images)]


def register_unlabeled(name: str, source: str | Path, *, evaluation: bool = False) -> int:
    """Register images without labels, check a sample of them, and return their number.

    Raises: as :func:`unlabeled_records`; DataError with all errors of the sample.
    """
    records = unlabeled_records(source)
    check_images(source, records, evaluation=evaluation)
    register_or_replace(name, lambda: records)
    MetadataCatalog.get(name).set(evaluator_type=UNLABELED, image_root=str(source))
    return len(records)


def register_unlabeled_lazily(name: str, source: Callable[[], Path]) -> None:
    """Register images without labels that are listed when they are first requested."""
    register_or_replace(name, lambda: unlabeled_records(source()))
    MetadataCatalog.get(name).set(evaluator_type=UNLABELED)
