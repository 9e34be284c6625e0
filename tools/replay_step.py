#!/usr/bin/env python3
"""Replay the training iteration in which a loss or gradient was NaN or infinite."""

import argparse
import sys

EXAMPLES = """example:
  tools/replay_step.py output/mine/trouble_0000412.pth

The file contains weights, images, labels and random states, so neither the dataset nor the run is
needed. The output names the first module and gradient that are not finite, and the largest weight.
A bad label affects one loss of one image; a high learning rate causes large weights.
"""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", help="trouble_NNNNNNN.pth of a run")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    from focalnet_det.engine.replay import replay_file

    for part in replay_file(args.file, device=args.device):
        print(part)


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        main()
    sys.exit(0)
