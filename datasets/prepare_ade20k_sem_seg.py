#!/usr/bin/env python
"""Convert ADE20K's labels to Detectron2's layout. See datasets/README.md for the layout.

Examples:
    python datasets/prepare_ade20k_sem_seg.py
    python datasets/prepare_ade20k_sem_seg.py --root /data/ADEChallengeData2016 --workers 8
"""

from pathlib import Path

from ade20k_script import run_script


def convert(root: Path, workers: int, partial: bool) -> str:
    from focalnet_det.data.semantic.ade20k import LABELS, prepare_ade20k_sem_seg

    written = prepare_ade20k_sem_seg(root, workers=workers, partial=partial)
    return f"{root / LABELS}: complete, {written} files written."


if __name__ == "__main__":
    run_script(__doc__, convert)
