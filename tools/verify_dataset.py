#!/usr/bin/env python3
"""Finds what is wrong with a data set, and says how to mend it. Exit status 1 if it is unusable."""

import argparse
import sys

EXAMPLES = """examples:
  tools/verify_dataset.py --sem-images train --sem-labels train_labels --classes classes.txt
  tools/verify_dataset.py --sem-images images/training --sem-labels annotations/training \\
      --classes objectInfo150.txt
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    labels = parser.add_argument_group("folders of images and label maps")
    labels.add_argument("--sem-images", required=True, metavar="DIR")
    labels.add_argument("--sem-labels", required=True, metavar="DIR")
    labels.add_argument("--classes", required=True, metavar="FILE")
    first_label = "value of the first class; with 1, 0 is none"
    labels.add_argument("--first-label", type=int, choices=(0, 1), help=first_label)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    from focalnet_det.data.semantic import read_class_list
    from focalnet_det.data.verify import report, verify_sem_seg

    classes = read_class_list(args.classes, args.first_label)
    findings = verify_sem_seg(args.sem_images, args.sem_labels, classes)
    print(report(findings))
    return int(any(finding.fatal for finding in findings))


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        sys.exit(main())
