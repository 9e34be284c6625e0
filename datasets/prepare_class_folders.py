#!/usr/bin/env python
"""Cut the objects of a COCO file out into class folders, to train a classifier on them.

Examples:
    python datasets/prepare_class_folders.py --shapes
    python datasets/prepare_class_folders.py --coco-json a.json --images images --output crops
"""

from __future__ import annotations

import argparse
from pathlib import Path

from focalnet_det.errors import one_line_errors


def main() -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", action="store_true", help="of the generated dataset")
    parser.add_argument("--coco-json", type=Path, metavar="FILE", help="annotations")
    parser.add_argument("--images", type=Path, metavar="DIR", help="images of the annotations")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the class folders")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="categories; default: all")
    parser.add_argument("--largest", type=int, metavar="N", help="of them, the N most frequent")
    parser.add_argument("--most", type=int, metavar="N", help="objects of a category; default: all")
    parser.add_argument("--min-side", type=int, default=16, help="pixels of the shorter side (16)")
    args = parser.parse_args()
    with one_line_errors():
        from focalnet_det.data.classification.crops import export_crops, export_shapes

        paths = (args.coco_json, args.images, args.output)
        if args.shapes == any(paths) or (any(paths) and not all(paths)):
            raise ValueError("Give either --shapes, or --coco-json, --images and --output.")
        if args.shapes:
            counts = export_shapes()
        else:
            counts = export_crops(
                *paths,
                classes=args.classes,
                largest=args.largest,
                most=args.most,
                min_side=args.min_side,
            )
        for name, count in sorted(counts.items(), key=lambda row: -row[1]):
            print(f"{name}: {count}")


if __name__ == "__main__":
    main()
