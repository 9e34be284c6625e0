"""Register the user's own data sets: COCO files, panoptic files or label folders."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data.classification.image_folders import (
    class_folders,
    register_class_folders,
    register_unlabeled,
)
from ..data.panoptic.panoptic_sets import PanopticFiles, register_panoptic_json
from ..data.registry import register_coco_json
from ..data.semantic.label_folders import read_class_list, register_label_folders

# Words for the two splits in file names.
SPLIT_WORDS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}


@dataclass(frozen=True, kw_only=True)
class OwnSet:
    """The files of one data set.

    Attributes:
        labels: COCO JSON, panoptic JSON, or folder of label maps; "" for other kinds.
        images: folder of the images; of "classes" and "unlabeled", a folder or an archive.
        segments: folder of the PNGs of a panoptic JSON, "" for other kinds.
    """

    labels: str
    images: str
    segments: str = ""


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """The user's own data sets.

    Attributes:
        kind: "coco", "panoptic", "labels", "classes" (class folders) or "unlabeled" (images alone).
        train, val: data sets for training and evaluation; at most one of them is empty.
        classes: for "labels" and "classes", file of class names; see ``read_class_list``.
        first_label: for "labels", value of the first class if the file does not give it.
    """

    kind: str
    train: tuple[OwnSet, ...] = ()
    val: tuple[OwnSet, ...] = ()
    classes: str | None = None
    first_label: int | None = None

    def record(self) -> dict[str, Any]:
        """Return plain values, with absolute paths, for a saved config."""
        found = asdict(self)
        for split in ("train", "val"):
            found[split] = [{k: _absolute(v) for k, v in row.items()} for row in found[split]]
        found["classes"] = _absolute(self.classes or "") or None
        return found


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if path and "://" not in path else path


def from_record(record: Mapping[str, Any]) -> OwnData | None:
    """Return the data sets of a saved config, None if there are none.

    Raises: ValueError if the record is not a result of :meth:`OwnData.record`.
    """
    if not record:
        return None
    try:
        values = dict(record)
        for split in ("train", "val"):
            values[split] = tuple(OwnSet(**row) for row in values.get(split, ()))
        data = OwnData(**values)
        READERS[data.kind]
    except (TypeError, KeyError) as error:
        raise ValueError(f"The own_data section of the config is damaged: {error}.") from error
    return data


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """Properties of registered data sets.

    Attributes:
        train, val: names of the registered sets.
        num_images: number of annotated training images.
        classes: class names; for panoptic sets, those of things.
        stuff: for panoptic sets, class names of the semantic head.
        things: for panoptic sets, indices of the classes that are things.
        keypoints: number of keypoints per object, 0 for none.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    num_images: int
    classes: tuple[str, ...]
    stuff: tuple[str, ...] = ()
    things: tuple[int, ...] = ()
    keypoints: int = 0


@dataclass(frozen=True, kw_only=True)
class SetFacts:
    """Properties of one data set; fields as in :class:`DataFacts`."""

    num_images: int
    classes: tuple[str, ...]
    stuff: tuple[str, ...] = ()
    things: tuple[int, ...] = ()
    keypoints: int = 0


def register(data: OwnData, *, unified: bool = False) -> DataFacts:
    """Register data sets in Detectron2's catalogs, and return their properties.

    Args:
        data: the user's own data sets.
        unified: number things and stuff of panoptic sets together.
    Raises: ValueError if files are invalid, or have different classes.
    """
    taken: set[str] = set()
    names: dict[str, tuple[str, ...]] = {}
    facts: dict[str, list[SetFacts]] = {}
    for split, sets in (("train", data.train), ("val", data.val)):
        names[split] = tuple(set_name(row.labels or row.images, split, taken) for row in sets)
        reader = READERS[data.kind]
        if data.kind == "panoptic" and unified:
            reader = _unified_panoptic
        facts[split] = [
            reader(name, row, data, split == "val")
            for name, row in zip(names[split], sets, strict=True)
        ]
    sets = (*data.train, *data.val)
    first, *others = found = [*facts["train"], *facts["val"]]
    for row, fact in zip(sets[1:], others, strict=True):
        check_same_classes(fact.classes, first.classes, row.labels, sets[0].labels)
        check_same_classes(fact.stuff, first.stuff, row.labels, sets[0].labels)
    return DataFacts(
        train=names["train"],
        val=names["val"],
        num_images=sum(fact.num_images for fact in facts["train"] or found),
        classes=first.classes,
        stuff=first.stuff,
        things=first.things,
        keypoints=first.keypoints,
    )


def check_same_classes(
    classes: Sequence[str], expected: Sequence[str], file: str, expected_file: str
) -> None:
    """Check that two files have the same classes in the same order.

    Raises: ValueError if they do not.
    """
    if list(classes) != list(expected):
        raise ValueError(
            f"{file} has other categories than {expected_file}: "
            f"{sorted(set(classes) ^ set(expected)) or 'another order'}."
        )


def set_name(path: str, split: str, taken: set[str]) -> str:
    """Choose a name for a data set, such as "instances_val", and add it to ``taken``.

    Args:
        path: file or folder that gives the name; the split is appended if the name has none.
        split: "train" or "val".
        taken: names of this run; names in Detectron2's catalog are not used either.
    """
    stem = Path(path).resolve().name if Path(path).is_dir() else Path(path).stem
    words = "|".join(SPLIT_WORDS[split])
    named = re.search(rf"(^|[^a-z])({words})([^a-z]|$)", stem.lower())
    base = stem if named else f"{stem}_{split}"
    if base in taken and named:
        base = f"{stem}_{split}"
    name, count = base, 1
    while name in taken or _is_foreign(name):
        count += 1
        name = f"{base}_{count}"
    taken.add(name)
    return name


def _is_foreign(name: str) -> bool:
    return name in DatasetCatalog.list() and not MetadataCatalog.get(name).get("own_data", False)


# Arguments of a reader: name, files, all data, and True for a set to evaluate on.


def _coco(name: str, row: OwnSet, data: OwnData, evaluation: bool) -> SetFacts:  # noqa: ARG001
    classes = register_coco_json(name, row.labels, row.images, evaluation=evaluation)
    metadata = MetadataCatalog.get(name).set(own_data=True)
    points = metadata.get("keypoint_names") or ()
    return SetFacts(
        num_images=metadata.num_annotated_images, classes=tuple(classes), keypoints=len(points)
    )


def _panoptic(
    name: str,
    row: OwnSet,
    data: OwnData,  # noqa: ARG001
    evaluation: bool,
    *,
    separated: bool = True,
) -> SetFacts:
    files = PanopticFiles(panoptic_json=row.labels, panoptic_root=row.segments, images=row.images)
    classes = register_panoptic_json(name, files, evaluation=evaluation, separated=separated)
    metadata = MetadataCatalog.get(name).set(own_data=True)
    return SetFacts(
        num_images=metadata.num_annotated_images,
        classes=tuple(classes.thing_classes),
        stuff=tuple(classes.stuff_classes),
        things=tuple(classes.thing_ids.values()),
    )


def _unified_panoptic(name: str, row: OwnSet, data: OwnData, evaluation: bool) -> SetFacts:
    return _panoptic(name, row, data, evaluation, separated=False)


def _labels(name: str, row: OwnSet, data: OwnData, evaluation: bool) -> SetFacts:
    assert data.classes is not None
    classes = read_class_list(data.classes, data.first_label)
    count = register_label_folders(name, row.images, row.labels, classes, evaluation=evaluation)
    MetadataCatalog.get(name).set(own_data=True)
    return SetFacts(num_images=count, classes=classes.names)


def _classes(name: str, row: OwnSet, data: OwnData, evaluation: bool) -> SetFacts:
    """Read class folders, whose classes are those of the list or of the first set."""
    if data.classes is not None:
        expected = read_class_list(data.classes).names
    else:
        expected = tuple(class_folders((*data.train, *data.val)[0].images))
    classes, count = register_class_folders(name, row.images, expected, evaluation=evaluation)
    MetadataCatalog.get(name).set(own_data=True)
    return SetFacts(num_images=count, classes=classes)


def _unlabeled(name: str, row: OwnSet, data: OwnData, evaluation: bool) -> SetFacts:  # noqa: ARG001
    count = register_unlabeled(name, row.images, evaluation=evaluation)
    MetadataCatalog.get(name).set(own_data=True)
    return SetFacts(num_images=count, classes=())


READERS: dict[str, Callable[[str, OwnSet, OwnData, bool], SetFacts]] = {
    "coco": _coco,
    "panoptic": _panoptic,
    "labels": _labels,
    "classes": _classes,
    "unlabeled": _unlabeled,
}
