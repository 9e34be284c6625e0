#!/usr/bin/env python3
"""Time and memory of box and mask AP on made-up predictions, beside pycocotools."""

import argparse
import tempfile
from pathlib import Path

EXAMPLES = """examples:
  tools/benchmark_evaluation.py
  tools/benchmark_evaluation.py --images 500 --detections 300
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--detections", type=int, default=100, help="an image; default: 100")
    args = parser.parse_args()
    if args.images < 4 or args.detections < 1:
        parser.error("at least 4 images and 1 detection are needed")
    from focalnet_det.benchmark.evaluation_speed import TASKS, measure

    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.images, args.detections, Path(folder))
    print(f"{args.images} images, {args.detections} detections each, {' and '.join(TASKS)}:")
    print(f"  ours         {found.ours:8.2f} s")
    print(f"  pycocotools  {found.theirs:8.2f} s, {found.theirs / found.ours:.1f} times as long")
    print(f"  largest difference of a statistic: {found.difference:.1e} percent points")
    quarters = ", ".join(f"{value:.0f}" for value in found.memory)
    print(f"  peak memory of ours after each quarter of the images: {quarters} MiB")


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        main()
