#!/usr/bin/env python
"""Generate the dataset `shapes`. See datasets/README.md for its layout.

Examples:
    python datasets/make_shapes.py
    python datasets/make_shapes.py --train 4000 --val 500 --size 256x192 --seed 7 --out /tmp/shapes
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from focalnet_det.errors import one_line_errors


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = "output folder (default: $DETECTRON2_DATASETS/shapes, or datasets/shapes)"
    parser.add_argument("--out", type=Path, help=folder)
    parser.add_argument("--train", type=int, default=1000, help="training images (default: 1000)")
    parser.add_argument("--val", type=int, default=150, help="validation images (default: 150)")
    parser.add_argument("--size", default="192", help="side, or WIDTHxHEIGHT, in px (default: 192)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="default: cores")
    parser.add_argument(
        "--force", action="store_true", help="replace a dataset with other parameters"
    )
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with one_line_errors():
        from focalnet_det.data.shapes.generate import default_root, make_shapes, parse_size

        make_shapes(
            args.out or default_root(),
            train=args.train,
            val=args.val,
            size=parse_size(args.size),
            seed=args.seed,
            workers=args.workers,
            force=args.force,
        )


if __name__ == "__main__":
    main()
