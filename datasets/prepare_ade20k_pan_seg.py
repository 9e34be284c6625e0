#!/usr/bin/env python
"""Convert ADE20K's 150 classes to COCO panoptic files. See datasets/README.md for the layout.

Examples:
    python datasets/prepare_ade20k_pan_seg.py
    python datasets/prepare_ade20k_pan_seg.py --root /data/ADEChallengeData2016 --workers 8
"""

from pathlib import Path

from ade20k_script import run_script, summary


def convert(root: Path, workers: int, partial: bool) -> str:
    from focalnet_det.data.panoptic.ade20k_objects import prepare_ade20k_panoptic

    return summary(root, prepare_ade20k_panoptic(root, workers=workers, partial=partial))


if __name__ == "__main__":
    run_script(__doc__, convert)
