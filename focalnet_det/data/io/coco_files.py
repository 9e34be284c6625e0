"""Read COCO files of instances and keypoints, validate each row, and report all errors."""

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
from .box_format import BOX_FORMAT_REMEDIES, check_box_format
from .coco_objects import DROPPED, OBJECT_REMEDIES, check_object, is_box, repair_area
from .issues import ValidationErrors, shorten
from .json_files import Record, RowLocation, is_id, positive_int, read_json_lists
from .open_image import MAX_PIXELS, upright_size

# The masks of more objects take gigabytes for a single image.
MAX_OBJECTS_PER_IMAGE = 2000
NONE_USABLE = "files without any object inside its image"

REMEDIES = {
    "missing categories": "List the classes under `categories`.",
    "categories without id": "Set it to an integer, 0 or above.",
    "categories without name": "Add a name to each.",
    "duplicate category ids": "Use a unique id for each category.",
    "duplicate category names": "Use a unique name for each category, or merge them.",
    "categories with malformed keypoints": "List unique names.",
    "categories with different keypoints": "Use the same list in all categories with keypoints.",
    "missing images": "List the images under `images`.",
    "images without id": "Set it to an integer, 0 or above, not to a string.",
    "images without file_name": "Set it to the path below the image folder.",
    "duplicate image ids": "Use a unique id for each image, and correct image_id of its "
    "annotations; the second image would get the boxes of the first.",
    "images with a malformed width or height": "Set both to pixels of the upright image, or "
    "remove both to have them read from the image.",
    "images without width or height that cannot be opened": "Check the image folder and file_name.",
    "images with too many pixels": f"The limit is {MAX_PIXELS:,}. Cut them into tiles.",
    "annotations without image_id": "Set it to the integer id of an image.",
    "annotations without a known category_id": "Add the category, or correct the id.",
    "annotations with a malformed iscrowd": "Set it to 0 or 1.",
    "annotations with ignore": "Set iscrowd: 1 for regions that are neither object nor background.",
    "images with too many annotations": f"At most {MAX_OBJECTS_PER_IMAGE:,} fit into memory. Cut "
    "the image into tiles.",
    NONE_USABLE: "Boxes are [x, y, width, height] in absolute pixels of the image that image_id "
    "refers to.",
    **OBJECT_REMEDIES,
    **BOX_FORMAT_REMEDIES,
}


@dataclass(frozen=True, kw_only=True)
class CocoFile:
    """Contents of a validated COCO file.

    Attributes:
        path: annotation file.
        images: by id, with "file_name", and with "height" and "width" if known.
        annotations: those of listed images; repaired ones are copies.
        categories: in order of id.
        has_annotations: False for files of test sets, which have none.
        issues: {issue of ``ISSUE_POLICIES``: count}, both repaired and still to be dropped.
        settled: the subset of ``issues`` that are already repaired or dropped in ``annotations``.
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
        """Keypoint names, empty if the file defines none."""
        return next((c["keypoints"] for c in self.categories if c.get("keypoints")), [])

    def by_image(self) -> dict[int, list[Record]]:
        """Return the annotations of each image, in file order."""
        rows: dict[int, list[Record]] = {image_id: [] for image_id in self.images}
        for annotation in self.annotations:
            rows[annotation["image_id"]].append(annotation)
        return rows


def read_coco(
    path: str | Path, image_root: str | Path | None = None, *, evaluation: bool = False
) -> CocoFile:
    """Read and validate a COCO file of instances or keypoints.

    Args:
        path: annotation file.
        image_root: image folder, to read sizes that the file lacks; None leaves them out.
        evaluation: apply the evaluation column of ``ISSUE_POLICIES``, and accept files of test
            sets, which lack "annotations".
    Raises: FileNotFoundError if the file does not exist, DataError with all errors.
    """
    path = Path(path)
    required = ["images", "categories"] if evaluation else ["images", "annotations", "categories"]
    content = read_json_lists(path, required, "COCO", optional=["annotations"])
    errors = ValidationErrors(path, REMEDIES)
    issues: Counter[str] = Counter()
    categories = _check_categories(content["categories"], errors)
    images = _check_images(content["images"], image_root, errors, issues)
    rows = content.get("annotations", [])
    named = [c["keypoints"] for c in categories.values() if c.get("keypoints")]
    points = len(named[0]) if named and _are_unique_names(named[0]) else 0
    checker = _AnnotationChecker(images, categories, points, errors, issues)
    annotations = checker.check(rows)
    errors.raise_if_any()  # the checks across rows below rely on valid rows
    issues[BOX_CONTRADICTS] += check_box_format(annotations, images, errors)
    checker.check_counts(annotations, evaluation=evaluation)
    errors.raise_if_any()
    issues = +issues  # removes zero counts
    return CocoFile(
        path=path,
        images=images,
        annotations=annotations,
        categories=[categories[k] for k in sorted(categories)],
        has_annotations="annotations" in content,
        issues=issues,
        settled=Counter({k: n for k, n in issues.items() if k not in (CROWD, *DROPPED)}),
    )


def _check_categories(rows: list[Record], errors: ValidationErrors) -> dict[int, Record]:
    """Return the categories by id."""
    found: dict[int, Record] = {}
    names: dict[str, RowLocation] = {}
    points: list[Any] = []
    if not rows:
        errors.add("missing categories")
    for index, row in enumerate(rows):
        where = RowLocation("categories", index, row)
        name, key = row.get("name"), row.get("id")
        if not isinstance(name, str) or not name.strip():
            errors.add("categories without name", where)
        elif name in names:
            errors.add("duplicate category names", f"{shorten(name)} at {names[name]} and {where}")
        else:
            names[name] = where
        if not is_id(key):
            errors.add("categories without id", where)
        elif key in found:
            errors.add("duplicate category ids", where)
        else:
            found[key] = row
        if row.get("keypoints"):
            points.append(row["keypoints"])
            if not _are_unique_names(row["keypoints"]):
                errors.add("categories with malformed keypoints", where)
            elif row["keypoints"] != points[0]:
                errors.add("categories with different keypoints", where)
    return found


def _are_unique_names(names: Any) -> bool:
    return (
        isinstance(names, list)
        and all(isinstance(name, str) and name for name in names)
        and len(set(names)) == len(names)
    )


def _check_images(
    rows: list[Record], root: str | Path | None, errors: ValidationErrors, issues: Counter[str]
) -> dict[int, Record]:
    """Return the images by id, with the size if known."""
    found: dict[int, Record] = {}
    places: dict[int, RowLocation] = {}
    if not rows:
        errors.add("missing images")
    for index, row in enumerate(rows):
        where = RowLocation("images", index, row)
        key, name = row.get("id"), row.get("file_name")
        # Evaluating predictions does not need the images.
        if name is None and root is None:
            row = {**row, "file_name": ""}
        elif not isinstance(name, str) or not name or "\0" in name:
            errors.add("images without file_name", where)
            continue
        if not is_id(key):
            errors.add("images without id", where)
            continue
        if key in found:
            errors.add("duplicate image ids", f"{shorten(key)} at {places[key]} and {where}")
            continue
        found[key], places[key] = _with_size(row, where, root, errors, issues), where
    names = Counter(image["file_name"] for image in found.values() if image["file_name"])
    if twice := sum(count - 1 for count in names.values()):
        issues[IMAGE_TWICE] += twice
    return found


def _with_size(
    row: Record,
    where: object,
    root: str | Path | None,
    errors: ValidationErrors,
    issues: Counter[str],
) -> Record:
    sides = [row.get("height"), row.get("width")]
    unsized = {k: v for k, v in row.items() if k not in ("height", "width")}
    if None not in sides:
        height, width = map(positive_int, sides)
        if height is None or width is None:
            errors.add("images with a malformed width or height", f"{where}: {shorten(sides)}")
            return unsized
        if height * width > MAX_PIXELS:
            errors.add("images with too many pixels", f"{where}: {width} x {height}")
            return unsized
        if (height, width) != tuple(sides) or float in map(type, sides):
            return {**row, "height": height, "width": width}
        return row
    if root is None:
        return unsized
    try:
        height, width = upright_size(Path(root) / row["file_name"])
    # Pillow raises many exception types on damaged headers.
    except Exception as error:
        kind = "images without width or height that cannot be opened"
        errors.add(kind, f"{where}: {row['file_name']}: {error}")
        return unsized
    issues[NO_SIZE] += 1
    return {**row, "height": height, "width": width}


class _AnnotationChecker:
    """Validate and repair the annotations of a file.

    Args:
        images, categories: of the file, by id.
        points: number of keypoints per annotation, 0 for none.
        errors, issues: collect the results.
    """

    def __init__(
        self,
        images: Mapping[int, Record],
        categories: Mapping[int, Record],
        points: int,
        errors: ValidationErrors,
        issues: Counter[str],
    ) -> None:
        self.images, self.categories, self.points = images, categories, points
        self.errors, self.issues = errors, issues
        # Annotations that training drops, by issue.
        self.dropped: dict[str, list[RowLocation]] = defaultdict(list)

    def check(self, rows: list[Record]) -> list[Record]:
        """Return the annotations of listed images, repaired if necessary."""
        self._check_numbers(rows)
        valid = list(self._checked(rows))
        # Annotations can be renumbered because nothing refers to their ids.
        ids = [row.get("id") for row in valid]
        if all(map(is_id, ids)) and len(set(ids)) == len(ids):
            return valid
        known = Counter(key for key in ids if is_id(key))
        self.issues[NO_ID] += len(ids) - len(known)
        return [{**row, "id": number} for number, row in enumerate(valid, start=1)]

    def _check_numbers(self, rows: list[Record]) -> None:
        """Raise on images with too many annotations, before checking each of them."""
        by_image = Counter(row["image_id"] for row in rows if is_id(row.get("image_id")))
        for image_id, count in by_image.items():
            if count > MAX_OBJECTS_PER_IMAGE and image_id in self.images:
                name = self.images[image_id]["file_name"]
                self.errors.add(
                    "images with too many annotations", f"{name} (id {image_id}) has {count:,}"
                )
                self.errors.raise_if_any()

    def _checked(self, rows: list[Record]) -> Iterator[Record]:
        for index, row in enumerate(rows):
            where = RowLocation("annotations", index, row)
            image_id = row.get("image_id")
            if not is_id(image_id):
                self.errors.add(
                    "annotations without image_id", f"{where}: {shorten(row.get('image_id'))}"
                )
                continue
            if image_id not in self.images:
                self.issues[UNLISTED_IMAGE] += 1
                continue
            category = row.get("category_id")
            if not is_id(category) or category not in self.categories:
                self.errors.add(
                    "annotations without a known category_id", f"{where}: {shorten(category)}"
                )
                continue
            if not self._check_flags(row, where):
                continue
            yield self._repaired(row, where)

    def _check_flags(self, row: Record, where: object) -> bool:
        crowd = row.get("iscrowd", 0)
        if not isinstance(crowd, int) or crowd not in (0, 1):
            self.errors.add("annotations with a malformed iscrowd", f"{where}: {shorten(crowd)}")
            return False
        if row.get("ignore"):
            self.errors.add("annotations with ignore", where)
            return False
        return True

    def _repaired(self, row: Record, where: RowLocation) -> Record:
        image = self.images[row["image_id"]]
        size = (image["height"], image["width"]) if "height" in image else None
        row, problems = check_object(row, size, self.points, where, self.errors)
        if not set(problems) & set(DROPPED):
            row, area_problems = repair_area(row, size)
            problems = [*problems, *area_problems]
        self.issues.update(problems)
        self.issues[CROWD] += int(row.get("iscrowd", 0))
        for problem in set(problems) & set(DROPPED):
            self.dropped[problem].append(where)
        return row

    def check_counts(self, annotations: list[Record], *, evaluation: bool) -> None:
        """Check properties of the file as a whole, and count duplicates."""
        objects = sum(not row.get("iscrowd") for row in annotations)
        for problem, places in self.dropped.items():
            # Training drops a few of them, but a majority suggests a different format.
            if evaluation or 2 * len(places) > objects:
                for where in places:
                    self.errors.add(DROPPED[problem], where)
        if objects and not evaluation and not any(map(self._is_usable, annotations)):
            self.errors.add(NONE_USABLE, f"{objects} objects")
        self._count_repeated(annotations)

    def _is_usable(self, row: Record) -> bool:
        """Return whether an object's box overlaps its image."""
        image, box = self.images[row["image_id"]], row.get("bbox")
        if row.get("iscrowd") or not is_box(box):
            return False
        width, height = image.get("width", math.inf), image.get("height", math.inf)
        inside = box[0] < width and box[1] < height and box[0] + box[2] > 0 and box[1] + box[3] > 0
        return bool(inside and box[2] > 0 and box[3] > 0)

    def _count_repeated(self, annotations: list[Record]) -> None:
        """Count duplicates: objects of the same image with equal class, box and mask."""
        groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
        for row in annotations:
            if not row.get("iscrowd"):
                groups[row["image_id"], row["category_id"], _hashable(row.get("bbox"))].append(row)
        for rows in groups.values():
            if len(rows) > 1:
                shapes = [repr((r.get("segmentation"), r.get("keypoints"))) for r in rows]
                self.issues[OBJECT_TWICE] += len(shapes) - len(set(shapes))


def _hashable(box: Any) -> Any:
    """Return a hashable form of a box."""
    return tuple(box) if is_box(box) else repr(box)
