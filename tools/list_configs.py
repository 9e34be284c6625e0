#!/usr/bin/env python3
"""List the configs of the package, or write the model zoo of the documentation."""

import argparse
from pathlib import Path

EXAMPLES = """examples:
  tools/list_configs.py                 # all
  tools/list_configs.py nano            # the small ones, for machines without a GPU
  tools/list_configs.py 'COCO-Detection/*'
  tools/list_configs.py --zoo-page docs/zoo.md
"""


def main() -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pattern", nargs="?", default="*", help="a word, or a pattern with *")
    parser.add_argument(
        "--zoo-page", metavar="FILE", help="count every model, and replace the tables of this page"
    )
    args = parser.parse_args()
    from focalnet_det.resources import list_configs, resource_folder

    if args.zoo_page:
        from focalnet_det.experiment.zoo_page import update_zoo_page

        update_zoo_page(Path(args.zoo_page))
        return
    found = list_configs(args.pattern)
    if not found:
        raise ValueError(f"No config matches {args.pattern!r}.")
    for path, text in found.items():
        print(f"configs/{path}\n    {text}")
    print(f"\nThey are in {resource_folder('configs')}; --config-file takes the paths above.")


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        main()
