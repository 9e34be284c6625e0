"""Share the command line of the scripts that prepare ADE20K."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from focalnet_det.errors import one_line_errors


def run_script(description: str, convert: Callable[[Path, int, bool], str]) -> None:
    """Run a script.

    Args:
        description: its docstring.
        convert: (folder of ADE20K, processes, whether a part is accepted) -> what it did.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root",
        type=Path,
        help="unpacked archives (default: $DETECTRON2_DATASETS/ADEChallengeData2016)",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="default: cores")
    parser.add_argument("--partial", action="store_true", help="accept a part of the dataset")
    args = parser.parse_args()
    with one_line_errors():
        from focalnet_det.data.semantic.ade20k import default_ade20k_root

        print(convert(args.root or default_ade20k_root(), args.workers, args.partial))


def summary(root: Path, written: Sequence[Path]) -> str:
    """Describe files that were written into a folder."""
    names = ", ".join(path.name for path in written)
    return f"{root}: complete, {names or 'nothing'} written."
