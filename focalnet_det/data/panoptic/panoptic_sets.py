"""Register panoptic datasets: the generated one, COCO's, ADE20K's, and any other in COCO format.

There are two class layouts. "separated" (Panoptic FPN): the box head predicts things 0, 1, ...; the
semantic head predicts 0 for all things and 1, 2, ... for stuff. "unified" (Mask2Former): all
classes are 0, 1, ... in order of category id, things and stuff alike.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from ..io.coco_files import read_coco
from ..io.labels import IGNORE, LabelReader, LabelRule
from ..io.panoptic_files import check_segment_files
from ..registry import check_images, coco_records, register_coco_lazily, register_or_replace
from ..semantic.ade20k import default_ade20k_root
from ..semantic.label_folders import ClassList, paired_files, register_sem_seg
from ..shapes.export import ADE_NAMES, COLORS, STUFF_IDS, THING_IDS
from ..shapes.generate import default_root
from ..shapes.scene import STUFF_CLASSES, THING_CLASSES
from .ade20k_objects import panoptic_categories
from .segments import PanopticFile, Record, SegmentLabels, read_panoptic_json

THINGS = "things"
# Color of "things" in Detectron2's metadata of Panoptic FPN, RGB 0..255.
THINGS_COLOR = (82, 18, 128)


@dataclass(frozen=True, kw_only=True)
class PanopticFiles:
    """Paths of a panoptic dataset.

    Attributes:
        panoptic_json, panoptic_root: the JSON, and the folder of its PNGs.
        images: image folder.
        instances_json: COCO instances of the things, for box and mask AP; None for none.
        sem_seg_root: semantic labels, named like the PNGs; None derives them from the PNGs.
    """

    panoptic_json: str | Path
    panoptic_root: str | Path
    images: str | Path
    instances_json: str | Path | None = None
    sem_seg_root: str | Path | None = None


@dataclass(frozen=True, kw_only=True)
class PanopticClasses:
    """Mapping of category ids to classes of the model.

    Attributes:
        thing_ids, stuff_ids: category id -> class.
        thing_classes, stuff_classes: names, by class.
        thing_colors, stuff_colors: RGB 0..255, by class; None for none.
        separated: class layout, see the module docstring.
    """

    thing_ids: Mapping[int, int]
    stuff_ids: Mapping[int, int]
    thing_classes: Sequence[str]
    stuff_classes: Sequence[str]
    thing_colors: Sequence[Sequence[int]] | None = None
    stuff_colors: Sequence[Sequence[int]] | None = None
    separated: bool = True

    def metadata(self) -> Record:
        """Return metadata with the keys of Detectron2's panoptic datasets."""
        metadata = {
            "thing_dataset_id_to_contiguous_id": dict(self.thing_ids),
            "stuff_dataset_id_to_contiguous_id": dict(self.stuff_ids),
            "thing_classes": list(self.thing_classes),
            "stuff_classes": list(self.stuff_classes),
        }
        for name in ("thing_colors", "stuff_colors"):
            if (colors := getattr(self, name)) is not None:
                metadata[name] = [tuple(color) for color in colors]
        return metadata

    def semantic_class(self, category_id: int) -> int:
        """Return the class of a category in the semantic head."""
        if category_id not in self.thing_ids:
            return self.stuff_ids[category_id]
        return 0 if self.separated else self.thing_ids[category_id]


def separated_classes(categories: Sequence[Record]) -> PanopticClasses:
    """Build the class layout of Panoptic FPN.

    Args:
        categories: of a panoptic JSON, in order of id.
    Source: facebookresearch/detectron2:detectron2/data/datasets/builtin_meta.py
        (_get_coco_panoptic_separated_meta).
    """
    things = [c for c in categories if c["isthing"]]
    stuff = [c for c in categories if not c["isthing"]]
    colored = all("color" in c for c in categories)
    return PanopticClasses(
        thing_ids={c["id"]: k for k, c in enumerate(things)},
        stuff_ids={c["id"]: k for k, c in enumerate(stuff, start=1)},
        thing_classes=[c["name"] for c in things],
        stuff_classes=[THINGS, *(c["name"] for c in stuff)],
        thing_colors=[c["color"] for c in things] if colored else None,
        stuff_colors=[THINGS_COLOR, *(c["color"] for c in stuff)] if colored else None,
    )


def unified_classes(categories: Sequence[Record]) -> PanopticClasses:
    """Build the class layout of Mask2Former.

    Args:
        categories: of a panoptic JSON, in order of id.
    """
    ids = {c["id"]: k for k, c in enumerate(categories)}
    names = [c["name"] for c in categories]
    colors = [c["color"] for c in categories] if all("color" in c for c in categories) else None
    return PanopticClasses(
        thing_ids={c["id"]: ids[c["id"]] for c in categories if c["isthing"]},
        stuff_ids={c["id"]: ids[c["id"]] for c in categories if not c["isthing"]},
        thing_classes=names,
        stuff_classes=names,
        thing_colors=colors,
        stuff_colors=colors,
        separated=False,
    )


def panoptic_records(
    file: PanopticFile, files: PanopticFiles, classes: PanopticClasses
) -> list[Record]:
    """Build records in Detectron2's format, with "label_rule" for the semantic labels.

    Raises: ValueError if a segment has an unknown category.
    """
    rule = LabelRule(num_classes=len(classes.stuff_classes))
    records = []
    for image_id, annotation in file.annotations.items():
        segments = [_classified(s, classes, annotation) for s in annotation["segments_info"]]
        png = Path(files.panoptic_root) / annotation["file_name"]
        labels: tuple[Path, LabelReader]
        if files.sem_seg_root is None:
            table = {
                segment["id"]: classes.semantic_class(segment["category_id"])
                for segment in annotation["segments_info"]
            }
            labels = (png, SegmentLabels(table))
        else:
            labels = (Path(files.sem_seg_root) / annotation["file_name"], rule)
        image = file.images[image_id]
        sizes: Record = {side: image[side] for side in ("height", "width") if side in image}
        records.append(
            {
                "file_name": str(Path(files.images) / image["file_name"]),
                "image_id": image_id,
                **sizes,
                "pan_seg_file_name": str(png),
                "segments_info": segments,
                "sem_seg_file_name": str(labels[0]),
                "label_rule": labels[1],
            }
        )
    return records


def _classified(segment: Record, classes: PanopticClasses, annotation: Record) -> Record:
    """Replace the category id of a segment by its class, and add "isthing"."""
    category = segment["category_id"]
    for ids, isthing in ((classes.thing_ids, True), (classes.stuff_ids, False)):
        if category in ids:
            return {**segment, "category_id": ids[category], "isthing": isthing}
    raise ValueError(
        f"Image {annotation['image_id']} ({annotation['file_name']}) has a segment of category "
        f"{category}, which is unknown to the dataset."
    )


def register_panoptic(name: str, files: PanopticFiles, classes: PanopticClasses) -> None:
    """Register a panoptic dataset, replacing any dataset of the same name.

    The files are read when the records are first requested.
    """

    def records() -> list[Record]:
        return panoptic_records(read_panoptic_json(files.panoptic_json), files, classes)

    _replace(name, records, files, classes.metadata())


def _replace(
    name: str, records: Callable[[], list[Record]], files: PanopticFiles, metadata: Record
) -> None:
    register_or_replace(name, records)
    json_file = None if files.instances_json is None else str(files.instances_json)
    MetadataCatalog.get(name).set(
        panoptic_json=str(files.panoptic_json),
        panoptic_root=str(files.panoptic_root),
        image_root=str(files.images),
        json_file=json_file,
        evaluator_type="coco_panoptic_seg",
        ignore_label=IGNORE,
        label_divisor=1000,
        **metadata,
    )


def register_panoptic_json(
    name: str, files: PanopticFiles, *, evaluation: bool = False, separated: bool = True
) -> PanopticClasses:
    """Check a panoptic JSON, its images and PNGs, and register it.

    Args:
        name: name in Detectron2's catalogs; an existing dataset of this name is replaced.
        files: paths.
        evaluation: apply the stricter rules of evaluation: segments and PNGs must agree.
        separated: the numbering, see above.
    Returns: the classes that the file lists.
    Raises: ValueError if a folder does not exist, or with all errors of the files,
        FileNotFoundError if the JSON does not exist.
    """
    for what, folder in (("image", files.images), ("panoptic", files.panoptic_root)):
        if not Path(folder).is_dir():
            raise ValueError(f"The {what} folder {folder} does not exist.")
    file = read_panoptic_json(files.panoptic_json)
    for things in (True, False):
        if not file.names(things=things):
            raise ValueError(
                f"{file.path} has no {'thing' if things else 'stuff'} categories. Train "
                f"{'semantic' if things else 'instance'} segmentation instead."
            )
    numbering = separated_classes if separated else unified_classes
    classes = numbering(list(file.categories.values()))
    records = panoptic_records(file, files, classes)
    check_images(file.path, records, evaluation=evaluation)
    check_segment_files(file.path, records, evaluation=evaluation)
    register_panoptic(name, files, classes)
    MetadataCatalog.get(name).set(num_annotated_images=len(file.annotations))
    return classes


def register_shapes_panoptic() -> None:
    """Register ``shapes_panoptic_train``, ``_val``, and both as ``..._unified``."""
    root = default_root()
    names, ids = (*THING_CLASSES, *STUFF_CLASSES), (*THING_IDS, *STUFF_IDS)
    rows = zip(ids, names, COLORS, strict=True)
    categories: list[Record] = [
        {"id": i, "name": name, "isthing": int(i in THING_IDS), "color": color}
        for i, name, color in rows
    ]
    for split in ("train", "val"):
        files = PanopticFiles(
            panoptic_json=root / f"annotations/panoptic_{split}.json",
            panoptic_root=root / f"panoptic_{split}",
            images=root / f"images/{split}",
            instances_json=root / f"annotations/instances_{split}.json",
        )
        register_panoptic(f"shapes_panoptic_{split}", files, separated_classes(categories))
        unified = unified_classes(sorted(categories, key=lambda category: category["id"]))
        register_panoptic(f"shapes_panoptic_{split}_unified", files, unified)


def register_coco_panoptic() -> None:
    """Replace Detectron2's COCO panoptic datasets by ones whose files are checked.

    They are ``coco_2017_{train,val}_panoptic_separated`` (Panoptic FPN: official instances, and
    semantic labels from ``datasets/prepare_coco_panoptic.py``), ``..._panoptic_stuffonly`` (only
    these semantic labels), ``..._panoptic`` (unified layout) and ``..._panoptic_with_sem_seg``
    (unified layout with Mask2Former's semantic labels).
    """
    root = Path(os.environ.get("DETECTRON2_DATASETS") or "datasets") / "coco"
    ordered = sorted(COCO_CATEGORIES, key=lambda category: category["id"])
    separated, unified = separated_classes(ordered), unified_classes(ordered)
    for split in ("train", "val"):
        name, year = f"coco_2017_{split}_panoptic", f"{split}2017"
        common: dict[str, Any] = {
            "panoptic_json": root / f"annotations/panoptic_{year}.json",
            "panoptic_root": root / f"panoptic_{year}",
            "images": root / year,
            "instances_json": root / f"annotations/instances_{year}.json",
        }
        stuff, all_classes = root / f"panoptic_stuff_{year}", root / f"panoptic_semseg_{year}"
        files = PanopticFiles(**common, sem_seg_root=stuff)
        records = partial(separated_records, files, f"{name}_separated")
        _replace(f"{name}_separated", records, files, separated.metadata())
        class_list = ClassList(names=tuple(separated.stuff_classes))
        colors = [(r, g, b) for r, g, b in separated.stuff_colors or ()]
        register_sem_seg(f"{name}_stuffonly", root / year, stuff, class_list, colors=colors)
        register_panoptic(name, PanopticFiles(**common), unified)
        files = PanopticFiles(**common, sem_seg_root=all_classes)
        register_panoptic(f"{name}_with_sem_seg", files, unified)


def separated_records(files: PanopticFiles, name: str) -> list[Record]:
    """Load official instances with semantic labels, the training data of Panoptic FPN.

    Raises: FileNotFoundError if a file is missing, ValueError if images have no labels.
    """
    assert files.sem_seg_root is not None
    assert files.instances_json is not None
    instances = coco_records(read_coco(files.instances_json, files.images), files.images)
    labels = {str(image): str(png) for image, png in paired_files(files.images, files.sem_seg_root)}
    unlabeled = [r["file_name"] for r in instances if r["file_name"] not in labels]
    if unlabeled:
        raise ValueError(
            f"{len(unlabeled)} images have no semantic labels in {files.sem_seg_root}, such as "
            f"{unlabeled[0]}. Run datasets/prepare_coco_panoptic.py."
        )
    rule = LabelRule(num_classes=len(MetadataCatalog.get(name).stuff_classes))
    return [
        {**r, "sem_seg_file_name": labels[r["file_name"]], "label_rule": rule} for r in instances
    ]


def register_ade20k_panoptic() -> None:
    """Register the output of ``datasets/prepare_ade20k_{ins,pan}_seg.py``.

    These are ``ade20k_instance_{train,val}`` (100 things) and ``ade20k_panoptic_{train,val}`` (150
    classes, separated layout; ``..._unified`` in the other one).
    """
    root = default_ade20k_root()
    categories = panoptic_categories()
    things = [category for category in categories if category["isthing"]]
    for split, folder in ADE_NAMES.items():
        instances, images = root / f"ade20k_instance_{split}.json", root / "images" / folder
        files = PanopticFiles(
            panoptic_json=root / f"ade20k_panoptic_{split}.json",
            panoptic_root=root / f"ade20k_panoptic_{split}",
            images=images,
            instances_json=instances,
        )
        register_panoptic(f"ade20k_panoptic_{split}", files, separated_classes(categories))
        unified = unified_classes(categories)
        register_panoptic(f"ade20k_panoptic_{split}_unified", files, unified)
        if (name := f"ade20k_instance_{split}") not in DatasetCatalog.list():
            metadata = {"thing_classes": [thing["name"] for thing in things]}
            register_coco_lazily(name, instances, images, metadata)
