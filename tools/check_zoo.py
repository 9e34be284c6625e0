#!/usr/bin/env python3
"""Train small recipes on generated data, and check that each reaches its minimum score.

The exit code is 1 if a score is too low. `make zoo-check` runs this tool.
"""

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  tools/check_zoo.py
  tools/check_zoo.py --only panoptic --output /tmp/zoo
"""


def main() -> int:
    """Run the tool, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/zoo"), metavar="DIR")
    parser.add_argument("--only", default="", metavar="TEXT", help="substring of recipe names")
    args = parser.parse_args()
    from focalnet_det.engine.zoo_check import check_zoo, table

    results = check_zoo(args.output, only=args.only)
    print(table(results))
    return int(not all(result.passed for result in results))


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        sys.exit(main())
