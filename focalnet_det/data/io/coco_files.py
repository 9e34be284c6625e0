"""COCO files of instances and keypoints: every row is checked, and all faults are shown."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..issue_policies import (
    BOX_CONTRADICTS,
    CROWD,
    IMAGE_TWICE,
    NO_ID,
    NO_SIZE,
    OBJECT_TWICE,
    UNLISTED_IMAGE,
)
from .coco_objects import DROPPED, OBJECT_REMEDIES, check_object, is_box, mend_area
from .coco_suspicions import SUSPICION_REMEDIES, check_boxes_together
from .issues import Faults, shown
from .json_files import Place, Record, is_id, read_json_lists, whole
from .open_image import MOST_PIXELS, upright_size

# Beyond, the masks of one image alone take gigabytes.
MOST_OBJECTS = 2000
NONE_USABLE = "files without one object inside its image"

REMEDIES = {
    "file lists no categories": "List the classes under `categories`.",
    "categories without id": "Give each a whole number, 0 or above.",
    "categories without name": "Give each a name.",
    "category ids that repeat": "Give each category an id of its own.",
    "category names that repeat": "Give each category a name of its own, or merge them.",
    "categories whose keypoints are no list of different names": "Name each point once.",
    "categories with other keypoints": "All categories with keypoints need the same list.",
    "file lists no images": "List the images under `images`.",
    "images without id": "Give each a whole number, 0 or above, no text.",
    "images without file_name": "Give the path below the image folder.",
    "image ids that repeat": "Give each image an id of its own, and correct image_id of its "
    "annotations: the second one would be trained with the boxes of the first.",
    "images with a malformed width or height": "Give the pixels of the upright image, or leave "
    "both out: they are then read from the image.",
    "images without width or height that cannot be opened": "Check the image folder and file_name.",
    "images of too many pixels": f"At most {MOST_PIXELS:,} can be read: cut them into tiles.",
    "annotations without image_id": "Give the id of an image, a whole number.",
    "annotations without a known category_id": "Add the category, or correct the id.",
    "annotations with a malformed iscrowd": "Write 0 or 1.",
    "annotations with ignore": "Write iscrowd: 1 for what is neither object nor background.",
    "images with too many annotations": f"At most {MOST_OBJECTS:,} fit into memory: cut the image "
    "into tiles.",
    NONE_USABLE: "Boxes are [x, y, width, height] in absolute pixels of the image that image_id "
    "names.",
    **OBJECT_REMEDIES,
    **SUSPICION_REMEDIES,
}


@dataclass(frozen=True, kw_only=True)
class CocoFile:
    """Hold a COCO file whose rows have been checked.

    Attributes:
        path: of the file.
        images: by id, with "file_name", and with "height" and "width" where they are known.
        annotations: of listed images; repaired ones are copies.
        categories: in order of id.
        has_annotations: False for the file of a test set, which has none.
        issues: {issue of ``ISSUE_POLICIES``: count}, those that were repaired here as well as
            those that are dropped later.
        settled: those of ``issues`` that ``annotations`` does not show any more.
    """

    path: Path
    images: Mapping[int, Record]
    annotations: list[Record]
    categories: list[Record]
    has_annotations: bool
    issues: Counter[str]
    settled: Counter[str]

    @property
    def keypoint_names(self) -> list[str]:
        """Names of the keypoints, none if the file has none."""
        return next((c["keypoints"] for c in self.categories if c.get("keypoints")), [])

    def by_image(self) -> dict[int, list[Record]]:
        """Return the annotations of each image, in the order of the file."""
        rows: dict[int, list[Record]] = {image_id: [] for image_id in self.images}
        for annotation in self.annotations:
            rows[annotation["image_id"]].append(annotation)
        return rows


def read_coco(
    path: str | Path, image_root: str | Path | None = None, *, evaluation: bool = False
) -> CocoFile:
    """Read a COCO file of instances or keypoints, and check every row.

    Args:
        image_root: folder of the images, for sizes that the file lacks; None leaves them out.
        evaluation: hold the file to the second column of the table of odd data: what a training
            drops stops an evaluation. The file of a test set may lack "annotations" then.
    Raises: FileNotFoundError if there is no such file, DataError with all faults.
    """
    path = Path(path)
    needed = ["images", "categories"] if evaluation else ["images", "annotations", "categories"]
    content = read_json_lists(path, needed, "COCO", optional=["annotations"])
    faults = Faults(path, REMEDIES)
    issues: Counter[str] = Counter()
    categories = _check_categories(content["categories"], faults)
    images = _check_images(content["images"], image_root, faults, issues)
    rows = content.get("annotations", [])
    named = [c["keypoints"] for c in categories.values() if c.get("keypoints")]
    points = len(named[0]) if named and _different_names(named[0]) else 0
    checker = _Rows(images, categories, points, faults, issues)
    annotations = checker.check(rows)
    faults.stop()  # what follows takes the rows to be sound one by one
    issues[BOX_CONTRADICTS] += check_boxes_together(annotations, images, faults)
    checker.check_counts(annotations, evaluation=evaluation)
    faults.stop()
    issues = +issues  # without zeros
    return CocoFile(
        path=path,
        images=images,
        annotations=annotations,
        categories=[categories[k] for k in sorted(categories)],
        has_annotations="annotations" in content,
        issues=issues,
        settled=Counter({k: n for k, n in issues.items() if k not in (CROWD, *DROPPED)}),
    )


def _check_categories(rows: list[Record], faults: Faults) -> dict[int, Record]:
    """Return the categories by id."""
    found: dict[int, Record] = {}
    names: dict[str, Place] = {}
    points: list[Any] = []
    if not rows:
        faults.add("file lists no categories")
    for index, row in enumerate(rows):
        where = Place("categories", index, row)
        name, key = row.get("name"), row.get("id")
        if not isinstance(name, str) or not name.strip():
            faults.add("categories without name", where)
        elif name in names:
            faults.add("category names that repeat", f"{shown(name)} at {names[name]} and {where}")
        else:
            names[name] = where
        if not is_id(key):
            faults.add("categories without id", where)
        elif key in found:
            faults.add("category ids that repeat", where)
        else:
            found[key] = row
        if row.get("keypoints"):
            points.append(row["keypoints"])
            if not _different_names(row["keypoints"]):
                faults.add("categories whose keypoints are no list of different names", where)
            elif row["keypoints"] != points[0]:
                faults.add("categories with other keypoints", where)
    return found


def _different_names(names: Any) -> bool:
    return (
        isinstance(names, list)
        and all(isinstance(name, str) and name for name in names)
        and len(set(names)) == len(names)
    )


def _check_images(
    rows: list[Record], root: str | Path | None, faults: Faults, issues: Counter[str]
) -> dict[int, Record]:
    """Return the images by id, with the size where it is known."""
    found: dict[int, Record] = {}
    places: dict[int, Place] = {}
    if not rows:
        faults.add("file lists no images")
    for index, row in enumerate(rows):
        where = Place("images", index, row)
        key, name = row.get("id"), row.get("file_name")
        # Results can be scored without images.
        if name is None and root is None:
            row = {**row, "file_name": ""}
        elif not isinstance(name, str) or not name or "\0" in name:
            faults.add("images without file_name", where)
            continue
        if not is_id(key):
            faults.add("images without id", where)
            continue
        if key in found:
            faults.add("image ids that repeat", f"{shown(key)} at {places[key]} and {where}")
            continue
        found[key], places[key] = _with_size(row, where, root, faults, issues), where
    names = Counter(image["file_name"] for image in found.values() if image["file_name"])
    if twice := sum(count - 1 for count in names.values()):
        issues[IMAGE_TWICE] += twice
    return found


def _with_size(
    row: Record, where: object, root: str | Path | None, faults: Faults, issues: Counter[str]
) -> Record:
    sides = [row.get("height"), row.get("width")]
    unsized = {k: v for k, v in row.items() if k not in ("height", "width")}
    if None not in sides:
        height, width = map(whole, sides)
        if height is None or width is None:
            faults.add("images with a malformed width or height", f"{where}: {shown(sides)}")
            return unsized
        if height * width > MOST_PIXELS:
            faults.add("images of too many pixels", f"{where}: {width} x {height}")
            return unsized
        if (height, width) != tuple(sides) or float in map(type, sides):
            return {**row, "height": height, "width": width}
        return row
    if root is None:
        return unsized
    try:
        height, width = upright_size(Path(root) / row["file_name"])
    # Pillow meets damaged headers with many kinds of error.
    except Exception as error:
        kind = "images without width or height that cannot be opened"
        faults.add(kind, f"{where}: {row['file_name']}: {error}")
        return unsized
    issues[NO_SIZE] += 1
    return {**row, "height": height, "width": width}


class _Rows:
    """Check the annotations of a file.

    Args:
        images, categories: of the file, by id.
        points: keypoints of an annotation, 0 for none.
        faults, issues: get what is found.
    """

    def __init__(
        self,
        images: Mapping[int, Record],
        categories: Mapping[int, Record],
        points: int,
        faults: Faults,
        issues: Counter[str],
    ) -> None:
        self.images, self.categories, self.points = images, categories, points
        self.faults, self.issues = faults, issues
        # Row names of annotations that a training drops, by problem.
        self.dropped: dict[str, list[Place]] = defaultdict(list)

    def check(self, rows: list[Record]) -> list[Record]:
        """Return the annotations that belong to a listed image, repaired where need be."""
        self._check_numbers(rows)
        kept = list(self._checked(rows))
        # Ids are names: nothing else refers to them.
        ids = [row.get("id") for row in kept]
        if all(map(is_id, ids)) and len(set(ids)) == len(ids):
            return kept
        known = Counter(key for key in ids if is_id(key))
        self.issues[NO_ID] += len(ids) - len(known)
        return [{**row, "id": number} for number, row in enumerate(kept, start=1)]

    def _check_numbers(self, rows: list[Record]) -> None:
        """Stop at images with too many annotations, before each of them is looked at."""
        by_image = Counter(row["image_id"] for row in rows if is_id(row.get("image_id")))
        for image_id, count in by_image.items():
            if count > MOST_OBJECTS and image_id in self.images:
                name = self.images[image_id]["file_name"]
                self.faults.add(
                    "images with too many annotations", f"{name} (id {image_id}) has {count:,}"
                )
                self.faults.stop()

    def _checked(self, rows: list[Record]) -> Iterator[Record]:
        for index, row in enumerate(rows):
            where = Place("annotations", index, row)
            image_id = row.get("image_id")
            if not is_id(image_id):
                self.faults.add(
                    "annotations without image_id", f"{where}: {shown(row.get('image_id'))}"
                )
                continue
            if image_id not in self.images:
                self.issues[UNLISTED_IMAGE] += 1
                continue
            category = row.get("category_id")
            if not is_id(category) or category not in self.categories:
                self.faults.add(
                    "annotations without a known category_id", f"{where}: {shown(category)}"
                )
                continue
            if not self._check_flags(row, where):
                continue
            yield self._mended(row, where)

    def _check_flags(self, row: Record, where: object) -> bool:
        crowd = row.get("iscrowd", 0)
        if not isinstance(crowd, int) or crowd not in (0, 1):
            self.faults.add("annotations with a malformed iscrowd", f"{where}: {shown(crowd)}")
            return False
        if row.get("ignore"):
            self.faults.add("annotations with ignore", where)
            return False
        return True

    def _mended(self, row: Record, where: Place) -> Record:
        image = self.images[row["image_id"]]
        size = (image["height"], image["width"]) if "height" in image else None
        row, problems = check_object(row, size, self.points, where, self.faults)
        if not set(problems) & set(DROPPED):
            row, area_problems = mend_area(row, size)
            problems = [*problems, *area_problems]
        self.issues.update(problems)
        self.issues[CROWD] += int(row.get("iscrowd", 0))
        for problem in set(problems) & set(DROPPED):
            self.dropped[problem].append(where)
        return row

    def check_counts(self, annotations: list[Record], *, evaluation: bool) -> None:
        """Check what no single row shows."""
        objects = sum(not row.get("iscrowd") for row in annotations)
        for problem, places in self.dropped.items():
            # A few are left out of a training; a file full of them is another format.
            if evaluation or 2 * len(places) > objects:
                for where in places:
                    self.faults.add(DROPPED[problem], where)
        if objects and not evaluation and not any(map(self._is_usable, annotations)):
            self.faults.add(NONE_USABLE, f"{objects} objects")
        self._count_repeated(annotations)

    def _is_usable(self, row: Record) -> bool:
        """Return whether a part of an object's box is inside its image."""
        image, box = self.images[row["image_id"]], row.get("bbox")
        if row.get("iscrowd") or not is_box(box):
            return False
        width, height = image.get("width", math.inf), image.get("height", math.inf)
        inside = box[0] < width and box[1] < height and box[0] + box[2] > 0 and box[1] + box[3] > 0
        return bool(inside and box[2] > 0 and box[3] > 0)

    def _count_repeated(self, annotations: list[Record]) -> None:
        """Count objects of the same class, box and mask in the same image."""
        alike: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
        for row in annotations:
            if not row.get("iscrowd"):
                alike[row["image_id"], row["category_id"], _key(row.get("bbox"))].append(row)
        for rows in alike.values():
            if len(rows) > 1:
                shapes = [repr((r.get("segmentation"), r.get("keypoints"))) for r in rows]
                self.issues[OBJECT_TWICE] += len(shapes) - len(set(shapes))


def _key(box: Any) -> Any:
    """Return a box in a form that can be compared; most are lists of numbers."""
    return tuple(box) if is_box(box) else repr(box)
