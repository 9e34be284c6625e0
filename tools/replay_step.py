#!/usr/bin/env python3
"""Computes again the iteration in which a training met a loss or gradient that is not finite."""

import argparse
import sys

EXAMPLES = """example:
  tools/replay_step.py output/mine/trouble_0000412.pth

The file holds the weights, the images with their labels and the random states, so that neither the
dataset nor the run is needed. It says which module first gave an output that is not finite, which
gradient was the first, and the largest weight: a bad label shows in one loss of one image, a rate
that is too high in large weights.
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", help="trouble_NNNNNNN.pth of a run")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from focalnet_det.engine.replay import replay_file

    for part in replay_file(args.file, device=args.device):
        print(part)


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        main()
    sys.exit(0)
