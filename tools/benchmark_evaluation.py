#!/usr/bin/env python3
"""Compare time and memory of box and mask AP with pycocotools on synthetic predictions."""

import argparse
import tempfile
from pathlib import Path

EXAMPLES = """examples:
  tools/benchmark_evaluation.py
  tools/benchmark_evaluation.py --images 500 --detections 300
"""


def main() -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5000, help="default: %(default)s")
    parser.add_argument("--detections", type=int, default=100, help="an image; default: 100")
    args = parser.parse_args()
    if args.images < 4 or args.detections < 1:
        parser.error("at least 4 images and 1 detection are required")
    from focalnet_det.benchmark.evaluation_speed import TASKS, measure

    with tempfile.TemporaryDirectory() as folder:
        result = measure(args.images, args.detections, Path(folder))
    print(f"{args.images} images, {args.detections} detections each, {' and '.join(TASKS)}:")
    print(f"  ours         {result.ours:8.2f} s")
    print(f"  pycocotools  {result.theirs:8.2f} s, {result.theirs / result.ours:.1f} times as long")
    print(f"  largest difference of a statistic: {result.difference:.1e} percentage points")
    quarters = ", ".join(f"{value:.0f}" for value in result.memory)
    print(f"  peak memory of ours after each quarter of the images: {quarters} MiB")


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        main()
