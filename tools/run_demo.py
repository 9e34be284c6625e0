#!/usr/bin/env python3
"""From nothing to a trained, evaluated, drawn Mask R-CNN: what `make demo` runs."""

import argparse

EXAMPLES = """examples:
  tools/run_demo.py
  tools/run_demo.py --output output/demo2 schedule.iterations=2000
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="output/demo", metavar="DIR")
    parser.add_argument(
        "--force",
        action="store_true",
        help="draw the data anew, in place of a generated dataset with other parameters",
    )
    parser.add_argument("opts", nargs="*", help="key=value overrides of the demo's config")
    args = parser.parse_args()
    from focalnet_det.engine.demo import run_demo

    run_demo(args.output, args.opts, force=args.force)


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        main()
