"""What is done about each problem of images and labels, and how often each was met."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("focalnet_det")

UNREADABLE_IMAGE = "unreadable image"
MISSING_IMAGE = "missing image file"
SIZE_DIFFERS = "size differs from annotation file"
EXIF_ROTATED = "image rotated by EXIF"
TRANSPARENT = "transparent image"
DEEPER_THAN_8_BITS = "image of more than 8 bits"
OTHER_COLOURS = "image not in RGB"
NO_ANNOTATION = "image without annotation"
UNLISTED_IMAGE = "annotation of an unlisted image"
CROWD = "crowd"
MALFORMED_BOX = "malformed box"
BOX_OUTSIDE = "box outside the image"
EMPTY_BOX = "box without area"
NO_MASK = "annotation without mask"
MALFORMED_MASK = "malformed mask"
MALFORMED_PART = "malformed part of a mask"
EMPTY_MASK = "empty mask"
CATEGORY_GAPS = "category ids with gaps"
UNREADABLE_LABELS = "unreadable label file"
LABEL_SIZE_DIFFERS = "label file of another size"
UNKNOWN_LABEL = "label of no class"
UNKNOWN_CATEGORY = "unknown category id"
SEVERAL_PICTURES = "file of several pictures"
NO_SIZE = "image without width or height"
IMAGE_TWICE = "image listed twice"
NO_ID = "annotation without an id of its own"
BOX_FROM_MASK = "box taken from the mask"
BOX_CONTRADICTS = "box that contradicts its mask"
AREA_REPLACED = "area that cannot be"
OBJECT_TWICE = "object listed twice"
VOID_SEGMENT = "pixels of no listed segment"


@dataclass(frozen=True)
class Policy:
    """What is done about one problem.

    Attributes:
        training: repaired (used after a correction), dropped (the annotation is left out), skipped
            (another image is drawn instead), kept (used as it is) or stopped (the run ends with an
            error).
        evaluation: the same. "kept" for annotations: the evaluator reads the file itself.
        explanation: one or two sentences, Markdown.
    """

    training: str
    evaluation: str
    explanation: str


ISSUE_POLICIES: dict[str, Policy] = {
    UNREADABLE_IMAGE: Policy(
        "skipped",
        "stopped",
        "Empty, truncated, of no format of the list above, of more than 89 million pixels, or no "
        "file but a device or a pipe. What a truncated file still holds is not used. An evaluation "
        "that left images out would not be comparable.",
    ),
    MISSING_IMAGE: Policy(
        "stopped",
        "stopped",
        "A wrong folder, most often; so are files that may not be read.",
    ),
    SIZE_DIFFERS: Policy(
        "skipped",
        "stopped",
        "`width` and `height` of the annotation file are those of another picture, so its boxes "
        "and masks are too. They must be those of the upright image (next row), as in COCO.",
    ),
    EXIF_ROTATED: Policy(
        "repaired",
        "repaired",
        "The image is turned upright. Annotations are taken to be in pixels of the upright image.",
    ),
    TRANSPARENT: Policy(
        "repaired",
        "repaired",
        "Laid on white, as browsers and printed pages show it. Ignoring transparency instead would "
        "uncover colours that nobody has seen.",
    ),
    DEEPER_THAN_8_BITS: Policy(
        "repaired",
        "repaired",
        "Integers of 16 or 32 bits are divided by 257, so that 65535 becomes 255; floats are "
        "scaled from the smallest of 0..1, 0..255 and 0..65535 that holds them. Integers are not "
        "stretched to the values that occur, so 12-bit data comes out dark. Values outside "
        "0..65535, and NaN, make the image unreadable. Colour of 16 bits is cut to its high bytes "
        "by Pillow itself, and not counted.",
    ),
    OTHER_COLOURS: Policy(
        "repaired",
        "repaired",
        "Grey, black and white, palette, CMYK, YCbCr, HSV and Lab are converted, and an alpha "
        "channel that hides nothing is removed. Colour profiles are not applied.",
    ),
    SEVERAL_PICTURES: Policy(
        "repaired",
        "repaired",
        "Of a TIFF of several pages or an animation, the first picture is used.",
    ),
    NO_SIZE: Policy("repaired", "repaired", "The size of the upright image is used."),
    IMAGE_TWICE: Policy(
        "kept", "kept", "Two entries of `images`, with an id each, name the same file."
    ),
    NO_ANNOTATION: Policy(
        "kept",
        "kept",
        "Trained on as background. Images that have no annotation but crowds in the file are left "
        "out before training, unless `filter_empty=False`; they are not counted.",
    ),
    UNLISTED_IMAGE: Policy(
        "dropped", "dropped", "Its `image_id` is not among `images` of the annotation file."
    ),
    CROWD: Policy(
        "dropped",
        "kept",
        "`iscrowd: 1` outlines a group, not an object. Evaluation ignores detections inside it.",
    ),
    MALFORMED_BOX: Policy(
        "dropped",
        "stopped",
        "Missing, not four finite numbers, or of negative width or height, and without a mask to "
        "take it from. A file without one usable object stops a training.",
    ),
    BOX_FROM_MASK: Policy(
        "repaired",
        "repaired",
        "The box is missing or malformed, the mask is not: the box around it is used.",
    ),
    BOX_CONTRADICTS: Policy(
        "kept",
        "kept",
        "The box and the one around the polygons have an IoU below 0.5. Boxes are trained on as "
        "they are, since some sets have boxes of whole objects and masks of their visible parts.",
    ),
    AREA_REPLACED: Policy(
        "repaired",
        "repaired",
        "`area` is missing, no number, not above 0, or more than twice that of the box: it is "
        "counted in the mask, or is that of the box. AP of small, medium and large objects, and of "
        "keypoints, depends on it.",
    ),
    NO_ID: Policy(
        "repaired",
        "repaired",
        "`id` is missing, or another annotation has it: all annotations of the file are numbered "
        "anew. Perfect predictions would score 25 % otherwise.",
    ),
    OBJECT_TWICE: Policy(
        "kept",
        "kept",
        "The same class, box and mask in the same image: one of the two can only be missed. Remove "
        "one.",
    ),
    BOX_OUTSIDE: Policy(
        "repaired", "kept", "Clipped to the image. Less than 0.01 px is rounding, and not counted."
    ),
    EMPTY_BOX: Policy(
        "dropped", "kept", "No width or no height is left inside the image, whatever its mask."
    ),
    NO_MASK: Policy("dropped", "kept", "Only where masks are trained."),
    MALFORMED_MASK: Policy(
        "dropped",
        "stopped",
        "Neither polygons nor RLE; polygons of an odd number of coordinates, of less than three "
        "points, with points further from the image than its longer side, or with an outline too "
        "long for the image; RLE of another size than the image, or whose runs do not fill it.",
    ),
    MALFORMED_PART: Policy(
        "repaired",
        "repaired",
        "Some polygons of a mask are malformed: they are left out, and the others are used.",
    ),
    EMPTY_MASK: Policy("dropped", "kept", "No pixel of the image belongs to it."),
    CATEGORY_GAPS: Policy(
        "repaired",
        "repaired",
        "Classes are numbered in order of id, and results are written with the ids of the file. "
        "Not counted.",
    ),
    UNREADABLE_LABELS: Policy(
        "skipped",
        "stopped",
        "A file of semantic labels that is damaged or a colour picture: labels are the values of a "
        "grey or palette picture.",
    ),
    LABEL_SIZE_DIFFERS: Policy(
        "skipped", "stopped", "Semantic labels of another height or width than the upright image."
    ),
    UNKNOWN_LABEL: Policy(
        "stopped",
        "stopped",
        "A value in a file of semantic labels that is neither a class nor 255 (with "
        "`--first-label 1`: nor 0). Most often the class list is wrong, or shifted by one.",
    ),
    VOID_SEGMENT: Policy(
        "repaired",
        "stopped",
        "A PNG of panoptic segments has colors that the JSON does not list: their pixels are void.",
    ),
    UNKNOWN_CATEGORY: Policy(
        "stopped", "stopped", "A `category_id` that is not among `categories` of the file."
    ),
}


class DataTally:
    """How often each problem was met, over a run.

    An image that is shown ten times counts ten times, and so do its annotations.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, issues: Mapping[str, int]) -> None:
        """Adds counts by problem.

        Raises: KeyError if a problem has no row in ``ISSUE_POLICIES``; nothing is added then.
        """
        unknown = sorted(set(issues) - set(ISSUE_POLICIES))
        if unknown:
            raise KeyError(
                f"No policy for {', '.join(map(repr, unknown))}. "
                f"Known: {', '.join(ISSUE_POLICIES)}."
            )
        self.counts.update(issues)

    def merge(self, other: "DataTally") -> None:
        """Adds the counts of another tally, such as that of another process."""
        self.add(other.counts)

    def state_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the counts.

        Raises: KeyError as ``add`` does; the counts stay as they were then.
        """
        loaded = DataTally()
        loaded.add(state["counts"])
        self.counts = loaded.counts

    def table(self) -> str:
        """Problem, what was done about it in training, and times met; only what was met."""
        met = [(name, ISSUE_POLICIES[name].training, self.counts[name]) for name in ISSUE_POLICIES]
        rows = [(name, action, str(count)) for name, action, count in met if count]
        if not rows:
            return "Images and labels: no problem was met."
        rows = [("images and labels", "policy", "times met"), *rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            f"{name:<{widths[0]}}  {action:<{widths[1]}}  {count:>{widths[2]}}"
            for name, action, count in rows
        )


def report_issues(subject: object, issues: Mapping[str, int], *, evaluation: bool) -> None:
    """Log what was found in a file, and what is done about it."""
    # Crowds are a part of sound data.
    if met := [name for name in ISSUE_POLICIES if issues.get(name) and name != CROWD]:
        phase = "evaluation" if evaluation else "training"
        rows = (f"{issues[n]} x {n} ({getattr(ISSUE_POLICIES[n], phase)})" for n in met)
        logger.warning("%s: %s. See datasets/README.md.", subject, ", ".join(rows))


def policy_table() -> str:
    """``ISSUE_POLICIES`` as a Markdown table: the one of datasets/README.md."""
    lines = ["| problem | in training | in evaluation | |", "|---|---|---|---|"]
    for name, policy in ISSUE_POLICIES.items():
        lines.append(f"| {name} | {policy.training} | {policy.evaluation} | {policy.explanation} |")
    return "\n".join(lines)
