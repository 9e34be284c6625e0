#!/usr/bin/env python
"""Convert COCO's panoptic PNGs to semantic labels. See datasets/README.md for the layout.

Examples:
    python datasets/prepare_coco_panoptic.py
    python datasets/prepare_coco_panoptic.py --root /data/coco --splits val2017 --workers 8
    python datasets/prepare_coco_panoptic.py --forms panoptic_semseg
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from focalnet_det.errors import one_line_errors


def main() -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.environ.get("DETECTRON2_DATASETS") or "datasets") / "coco"
    parser.add_argument("--root", type=Path, default=default, help="default: %(default)s")
    parser.add_argument(
        "--forms",
        nargs="+",
        choices=("panoptic_stuff", "panoptic_semseg"),
        default=("panoptic_stuff", "panoptic_semseg"),
        help="54 classes (panoptic FPN), 133 classes (Mask2Former); default: both",
    )
    parser.add_argument("--splits", nargs="+", default=("train2017", "val2017"), metavar="SPLIT")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="default: cores")
    args = parser.parse_args()
    with one_line_errors():
        from focalnet_det.data.panoptic.coco_panoptic import prepare_coco_panoptic

        written = prepare_coco_panoptic(
            args.root, forms=args.forms, splits=args.splits, workers=args.workers
        )
        print(f"{args.root}: complete, {written} files written.")


if __name__ == "__main__":
    main()
