#!/usr/bin/env python
"""Convert ADE20K's labels to Detectron2's layout. See datasets/README.md for the layout.

Examples:
    python datasets/prepare_ade20k_sem_seg.py
    python datasets/prepare_ade20k_sem_seg.py --root /data/ADEChallengeData2016 --workers 8
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from focalnet_det.errors import one_line_errors


def main() -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root",
        type=Path,
        help="unpacked archive (default: $DETECTRON2_DATASETS/ADEChallengeData2016)",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="default: cores")
    parser.add_argument("--partial", action="store_true", help="accept a part of the dataset")
    args = parser.parse_args()
    with one_line_errors():
        from focalnet_det.data.semantic.ade20k import (
            LABELS,
            default_ade20k_root,
            prepare_ade20k_sem_seg,
        )

        root = args.root or default_ade20k_root()
        written = prepare_ade20k_sem_seg(root, workers=args.workers, partial=args.partial)
        print(f"{root / LABELS}: complete, {written} files written.")


if __name__ == "__main__":
    main()
