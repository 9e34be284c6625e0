#!/usr/bin/env python3
"""Identify a checkpoint: layout, variant, levels, windows, head, precision, training progress."""

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from focalnet_det.checkpoint import Inspection

EXAMPLES = """examples:
  tools/inspect_checkpoint.py focalnet_tiny_lrf.pth
  tools/inspect_checkpoint.py focalnet_tiny_lrf.in1k --json
  tools/inspect_checkpoint.py output/mine/model_final.pth
"""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", metavar="FILE", help="path, folder, URL or registered name")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    return parser.parse_args()


def print_lines(found: "Inspection") -> None:
    """Print one property per line."""
    from focalnet_det.checkpoint.convert import layout_title

    lines = {
        "file": found.origin,
        "this is": found.architecture,
        "layout": layout_title(found.layout) if found.layout else "unknown",
        "family": found.family,
        "method": found.method,
        "variant": found.variant,
        "differs in": ", ".join(f"{k}={v}" for k, v in found.overrides.items()),
        **{name.replace("_", " "): value for name, value in found.shapes.items()},
        "classes": found.classes,
        "output norms": ", ".join(found.output_norms),
        "feature scales": found.feature_scales,
        "queries": found.queries,
        "conventions": found.conventions,
        "published tasks": ", ".join(found.tasks),
        "other parts": ", ".join(f"{name} ({n} tensors)" for name, n in found.parts.items()),
        "parameters": f"{found.parameters:,}",
        "precision": ", ".join(found.precision),
        "training": ", ".join(f"{name} {value}" for name, value in found.progress.items()),
        "left out, not run": ", ".join(found.ignored[:8]) + (", ..." if found.ignored[8:] else ""),
    }
    for title, value in lines.items():
        if value not in (None, ""):
            print(f"{title + ':':<24}{value}")
    for title, notes in (
        ("not in the shapes", found.ambiguous_settings),
        ("nearest", found.candidates),
    ):
        for note in notes:
            print(f"{title + ':':<24}{note}")


def main() -> None:
    """Run the tool."""
    args = parse_args()
    from focalnet_det.checkpoint import inspect_checkpoint

    found = inspect_checkpoint(args.weights)
    if args.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        print_lines(found)


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        main()
