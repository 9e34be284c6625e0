#!/usr/bin/env python3
"""Finds what is wrong with a data set, and says how to mend it. Exit status 1 if it is unusable."""

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  tools/verify_dataset.py --sem-images train --sem-labels train_labels --classes classes.txt
  tools/verify_dataset.py --sem-images images/training --sem-labels annotations/training \\
      --classes objectInfo150.txt
  tools/verify_dataset.py --panoptic-json annotations/panoptic_val2017.json \\
      --panoptic-root panoptic_val2017 --images val2017
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    labels = parser.add_argument_group("folders of images and label maps")
    labels.add_argument("--sem-images", metavar="DIR")
    labels.add_argument("--sem-labels", metavar="DIR")
    labels.add_argument("--classes", metavar="FILE")
    first_label = "value of the first class; with 1, 0 is none"
    labels.add_argument("--first-label", type=int, choices=(0, 1), help=first_label)
    segments = parser.add_argument_group("COCO panoptic files")
    segments.add_argument("--panoptic-json", metavar="FILE")
    segments.add_argument("--panoptic-root", metavar="DIR", help="default: as in COCO's archives")
    segments.add_argument("--images", metavar="DIR")
    args = parser.parse_args()
    given = [all((args.sem_images, args.sem_labels, args.classes)), bool(args.panoptic_json)]
    if sum(given) != 1 or (args.panoptic_json and not args.images):
        parser.error(
            "name label folders (--sem-images, --sem-labels, --classes) or panoptic files "
            "(--panoptic-json, --images)"
        )
    return args


def main() -> int:
    args = parse_args()
    from focalnet_det.data.verify import report

    if args.panoptic_json:
        from focalnet_det.data.verify_panoptic import verify_panoptic
        from focalnet_det.experiment.arguments import default_root

        root = args.panoptic_root or default_root(args.panoptic_json)
        findings = verify_panoptic(Path(args.panoptic_json), Path(root), Path(args.images))
    else:
        from focalnet_det.data.semantic import read_class_list
        from focalnet_det.data.verify import verify_sem_seg

        classes = read_class_list(args.classes, args.first_label)
        findings = verify_sem_seg(args.sem_images, args.sem_labels, classes)
    print(report(findings))
    return int(any(finding.fatal for finding in findings))


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        sys.exit(main())
