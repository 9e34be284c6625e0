"""Define how each issue of images and labels is handled, and count how often it occurs."""

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
NOT_RGB = "image not in RGB"
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
LABEL_SIZE_DIFFERS = "label size differs from image"
UNKNOWN_LABEL = "unknown label value"
UNKNOWN_CATEGORY = "unknown category id"
MULTIPLE_FRAMES = "image file with several frames"
NO_SIZE = "image without width or height"
IMAGE_TWICE = "duplicate image entry"
NO_ID = "missing or duplicate annotation id"
BOX_FROM_MASK = "box computed from the mask"
BOX_CONTRADICTS = "box that contradicts its mask"
AREA_REPLACED = "implausible area"
OBJECT_TWICE = "duplicate object"
VOID_SEGMENT = "pixels of an unlisted segment"
EMPTY_CLASS = "class without images"

# Names in checkpoints of earlier versions.
RENAMED_ISSUES = {
    "label file of another size": LABEL_SIZE_DIFFERS,
    "label of no class": UNKNOWN_LABEL,
    "file of several pictures": MULTIPLE_FRAMES,
    "image listed twice": IMAGE_TWICE,
    "annotation without an id of its own": NO_ID,
    "box taken from the mask": BOX_FROM_MASK,
    "area that cannot be": AREA_REPLACED,
    "object listed twice": OBJECT_TWICE,
    "pixels of no listed segment": VOID_SEGMENT,
}


@dataclass(frozen=True)
class IssuePolicy:
    """How one issue is handled.

    Attributes:
        training: "repaired" (corrected, then used), "dropped" (the annotation is ignored),
            "skipped" (another image is sampled instead), "kept" (used unchanged) or "stopped" (the
            run ends with an error).
        evaluation: likewise. Annotations are "kept" because the evaluator reads the file itself.
        explanation: one or two sentences, Markdown.
    """

    training: str
    evaluation: str
    explanation: str


ISSUE_POLICIES: dict[str, IssuePolicy] = {
    UNREADABLE_IMAGE: IssuePolicy(
        "skipped",
        "stopped",
        "Empty, truncated, in an unsupported format, larger than 89 million pixels, or a device or "
        "pipe. The intact part of a truncated file is not used. Evaluation stops because scores on "
        "a part of the images would not be comparable.",
    ),
    MISSING_IMAGE: IssuePolicy(
        "stopped",
        "stopped",
        "Most often the image folder is wrong. Files without read permission stop the run too.",
    ),
    SIZE_DIFFERS: IssuePolicy(
        "skipped",
        "stopped",
        "`width` and `height` in the annotation file do not match the image, so its boxes and "
        "masks cannot be trusted. They must describe the upright image (next row), as in COCO.",
    ),
    EXIF_ROTATED: IssuePolicy(
        "repaired",
        "repaired",
        "The image is rotated upright. Annotations are in pixels of the upright image.",
    ),
    TRANSPARENT: IssuePolicy(
        "repaired",
        "repaired",
        "Composited onto white, as browsers show it. Dropping the alpha channel instead would "
        "expose the arbitrary colors of transparent pixels.",
    ),
    DEEPER_THAN_8_BITS: IssuePolicy(
        "repaired",
        "repaired",
        "16- and 32-bit integers are divided by 257, so that 65535 becomes 255; floats are scaled "
        "from the smallest of the ranges 0..1, 0..255 and 0..65535 that contains them. Integers "
        "are not stretched to their actual range, so 12-bit data becomes dark. Values outside "
        "0..65535, and NaN, make the image unreadable. Pillow itself truncates 16-bit color to its "
        "high bytes; such images are not counted.",
    ),
    NOT_RGB: IssuePolicy(
        "repaired",
        "repaired",
        "Grayscale, bilevel, palette, CMYK, YCbCr, HSV and Lab images are converted, and an opaque "
        "alpha channel is removed. Color profiles are not applied.",
    ),
    MULTIPLE_FRAMES: IssuePolicy(
        "repaired",
        "repaired",
        "The first page of a TIFF or the first frame of an animation is used.",
    ),
    NO_SIZE: IssuePolicy("repaired", "repaired", "The size of the upright image is used."),
    IMAGE_TWICE: IssuePolicy(
        "kept", "kept", "Two entries of `images` with different ids refer to the same file."
    ),
    NO_ANNOTATION: IssuePolicy(
        "kept",
        "kept",
        "Used as background. Images whose only annotations in the file are crowds are removed "
        "before training, unless `filter_empty=False`; they are not counted.",
    ),
    UNLISTED_IMAGE: IssuePolicy(
        "dropped", "dropped", "Its `image_id` does not occur in `images` of the annotation file."
    ),
    CROWD: IssuePolicy(
        "dropped",
        "kept",
        "`iscrowd: 1` marks a group instead of an object. Evaluation ignores detections inside it.",
    ),
    MALFORMED_BOX: IssuePolicy(
        "dropped",
        "stopped",
        "Missing, not four finite numbers, or with negative width or height, and no mask to "
        "compute it from. Training stops if a file has no usable object at all.",
    ),
    BOX_FROM_MASK: IssuePolicy(
        "repaired",
        "repaired",
        "The box is missing or malformed, but the mask is valid: its bounding box is used.",
    ),
    BOX_CONTRADICTS: IssuePolicy(
        "kept",
        "kept",
        "The IoU of the box and the bounding box of its polygons is below 0.5. Boxes are used "
        "unchanged, since some datasets annotate boxes of whole objects but masks of visible "
        "parts.",
    ),
    AREA_REPLACED: IssuePolicy(
        "repaired",
        "repaired",
        "`area` is missing, not a positive number, or more than twice the area of the box: it is "
        "computed from the mask, or from the box if there is no mask. AP of small, medium and "
        "large objects and keypoint AP depend on it.",
    ),
    NO_ID: IssuePolicy(
        "repaired",
        "repaired",
        "`id` is missing or used more than once: all annotations of the file are renumbered. "
        "Otherwise even perfect predictions would score as low as 25 %.",
    ),
    OBJECT_TWICE: IssuePolicy(
        "kept",
        "kept",
        "Same class, box and mask in the same image: one of the two always counts as a miss. "
        "Remove one.",
    ),
    BOX_OUTSIDE: IssuePolicy(
        "repaired", "kept", "Clipped to the image. Less than 0.01 px is rounding and not counted."
    ),
    EMPTY_BOX: IssuePolicy(
        "dropped", "kept", "Its width or height inside the image is 0, regardless of its mask."
    ),
    NO_MASK: IssuePolicy("dropped", "kept", "Only if the model predicts masks."),
    MALFORMED_MASK: IssuePolicy(
        "dropped",
        "stopped",
        "Neither polygons nor RLE; polygons with an odd number of coordinates, fewer than three "
        "points, points farther from the image than its longer side, or an outline too long for "
        "the image; RLE whose size differs from the image or whose runs do not fill it.",
    ),
    MALFORMED_PART: IssuePolicy(
        "repaired",
        "repaired",
        "Some polygons of a mask are malformed: they are ignored, and the others are used.",
    ),
    EMPTY_MASK: IssuePolicy("dropped", "kept", "It contains no pixel of the image."),
    CATEGORY_GAPS: IssuePolicy(
        "repaired",
        "repaired",
        "Class indices follow the order of the ids, and results are written with the ids of the "
        "file. Not counted.",
    ),
    UNREADABLE_LABELS: IssuePolicy(
        "skipped",
        "stopped",
        "A semantic label file that is damaged or a color image: labels are the pixel values of a "
        "grayscale or palette image.",
    ),
    LABEL_SIZE_DIFFERS: IssuePolicy(
        "skipped", "stopped", "Height or width of the semantic labels and the upright image differ."
    ),
    UNKNOWN_LABEL: IssuePolicy(
        "stopped",
        "stopped",
        "A pixel value of a semantic label file that is neither a class nor 255 (nor 0 with "
        "`--first-label 1`). Most often the class list is wrong or shifted by one.",
    ),
    VOID_SEGMENT: IssuePolicy(
        "repaired",
        "stopped",
        "A panoptic PNG contains segment ids that the JSON does not list: their pixels are void.",
    ),
    EMPTY_CLASS: IssuePolicy(
        "kept",
        "kept",
        "A class folder without an image, or a class of the list without a folder. The model keeps "
        "its output; means over classes leave it out where it is evaluated.",
    ),
    UNKNOWN_CATEGORY: IssuePolicy(
        "stopped", "stopped", "A `category_id` that does not occur in `categories` of the file."
    ),
}


class IssueCounter:
    """Count how often each issue occurs over a run.

    An image that is sampled ten times counts ten times, and so do its annotations.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, issues: Mapping[str, int]) -> None:
        """Add counts by issue.

        Raises: KeyError if an issue has no entry in ``ISSUE_POLICIES``; nothing is added then.
        """
        unknown = sorted(set(issues) - set(ISSUE_POLICIES))
        if unknown:
            raise KeyError(
                f"No policy for {', '.join(map(repr, unknown))}. "
                f"Known: {', '.join(ISSUE_POLICIES)}."
            )
        self.counts.update(issues)

    def merge(self, other: "IssueCounter") -> None:
        """Add the counts of another counter, such as that of another process."""
        self.add(other.counts)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts for a checkpoint."""
        return {"counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the counts by those of a checkpoint.

        Raises: KeyError as in ``add``; the counts are unchanged then.
        """
        loaded = IssueCounter()
        loaded.add({RENAMED_ISSUES.get(name, name): n for name, n in state["counts"].items()})
        self.counts = loaded.counts

    def table(self) -> str:
        """Format the issues that occurred, with their training policy and count."""
        rows = [
            (name, policy.training, str(self.counts[name]))
            for name, policy in ISSUE_POLICIES.items()
            if self.counts[name]
        ]
        if not rows:
            return "Images and labels: no issues."
        rows = [("images and labels", "policy", "count"), *rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            f"{name:<{widths[0]}}  {action:<{widths[1]}}  {count:>{widths[2]}}"
            for name, action, count in rows
        )


def report_issues(subject: object, issues: Mapping[str, int], *, evaluation: bool) -> None:
    """Log the issues of a file and how each is handled.

    Args:
        subject: file or dataset that the message begins with.
        issues: {issue of ``ISSUE_POLICIES``: count}.
        evaluation: state the policies of evaluation instead of training.
    """
    # Crowds are part of valid data.
    if present := [name for name in ISSUE_POLICIES if issues.get(name) and name != CROWD]:
        phase = "evaluation" if evaluation else "training"
        rows = (f"{issues[n]} x {n} ({getattr(ISSUE_POLICIES[n], phase)})" for n in present)
        logger.warning("%s: %s. See datasets/README.md.", subject, ", ".join(rows))


def policy_table() -> str:
    """Format ``ISSUE_POLICIES`` as the Markdown table of datasets/README.md."""
    lines = ["| issue | in training | in evaluation | |", "|---|---|---|---|"]
    for name, policy in ISSUE_POLICIES.items():
        lines.append(f"| {name} | {policy.training} | {policy.evaluation} | {policy.explanation} |")
    return "\n".join(lines)
