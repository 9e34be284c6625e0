#!/usr/bin/env python3
"""Train, evaluate and visualize a small Mask R-CNN on generated data, as `make demo` does."""

import argparse

EXAMPLES = """examples:
  tools/run_demo.py
  tools/run_demo.py --output output/demo2 schedule.iterations=2000
"""


def main() -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="output/demo", metavar="DIR")
    parser.add_argument(
        "--force",
        action="store_true",
        help="regenerate the data, replacing a generated dataset with other parameters",
    )
    parser.add_argument("opts", nargs="*", help="key=value overrides of the demo's config")
    args = parser.parse_args()
    from focalnet_det.engine.demo import run_demo

    run_demo(args.output, args.opts, force=args.force)


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        main()
