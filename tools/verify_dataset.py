#!/usr/bin/env python3
"""Diagnose a dataset and suggest remedies. The exit code is 1 if it is unusable."""

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  tools/verify_dataset.py --coco-json train.json --images train/ \\
      --val-json val.json --val-images val/
  tools/verify_dataset.py --coco-json train.json --images train/ --fix repaired.json
  tools/verify_dataset.py --sem-images train --sem-labels train_labels --classes classes.txt
  tools/verify_dataset.py --sem-images images/training --sem-labels annotations/training \\
      --classes objectInfo150.txt
  tools/verify_dataset.py --panoptic-json annotations/panoptic_val2017.json \\
      --panoptic-root panoptic_val2017 --images val2017
"""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    coco = parser.add_argument_group("COCO files of instances or keypoints")
    coco.add_argument("--coco-json", metavar="FILE")
    coco.add_argument("--val-json", metavar="FILE", help="also check it, with --val-images")
    coco.add_argument("--fix", metavar="FILE", help="write a copy with safe repairs")
    labels = parser.add_argument_group("folders of images and label maps")
    labels.add_argument("--sem-images", metavar="DIR")
    labels.add_argument("--sem-labels", metavar="DIR")
    labels.add_argument("--classes", metavar="FILE")
    first_label = "value of the first class; with 1, 0 is ignored"
    labels.add_argument("--first-label", type=int, choices=(0, 1), help=first_label)
    segments = parser.add_argument_group("COCO panoptic files")
    segments.add_argument("--panoptic-json", metavar="FILE")
    segments.add_argument("--panoptic-root", metavar="DIR", help="default: as in COCO's archives")
    parser.add_argument("--images", metavar="DIR", help="of --coco-json or --panoptic-json")
    parser.add_argument("--val-images", metavar="DIR", help="also search for images in both")
    args = parser.parse_args()
    check_options(parser, args)
    return args


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with an error if the options do not specify exactly one kind of dataset."""
    folders = (args.sem_images, args.sem_labels, args.classes)
    kinds = [bool(args.coco_json), any(folders), bool(args.panoptic_json)]
    if sum(kinds) != 1 or (not any(folders) and not args.images) or (kinds[1] and not all(folders)):
        parser.error(
            "give a COCO file (--coco-json, --images), label folders (--sem-images, --sem-labels, "
            "--classes) or panoptic files (--panoptic-json, --images)"
        )
    if args.coco_json and bool(args.val_json) != bool(args.val_images):
        parser.error("--val-json and --val-images must be used together")
    if (args.fix or args.val_json) and not args.coco_json:
        parser.error("--fix and --val-json require --coco-json")


def main() -> int:
    """Run the tool, and return the exit code."""
    args = parse_args()
    from focalnet_det.data.doctor.findings import report

    findings = find(args)
    print(report(findings))
    if args.fix:
        from focalnet_det.data.doctor.coco_doctor import fix_coco

        repairs = fix_coco(Path(args.coco_json), Path(args.images), Path(args.fix))
        print("\n".join([f"Wrote {args.fix}.", *repairs]) if repairs else "Nothing to repair.")
    return int(any(finding.fatal for finding in findings))


def find(args: argparse.Namespace) -> list:
    """Return the findings of the specified dataset."""
    if args.coco_json:
        from focalnet_det.data.doctor.coco_doctor import verify_coco

        options = [args.coco_json, args.images, args.val_json, args.val_images]
        return verify_coco(*(None if option is None else Path(option) for option in options))
    if args.panoptic_json:
        from focalnet_det.data.doctor.folder_doctor import verify_panoptic_set
        from focalnet_det.experiment.arguments import default_png_folder

        root = args.panoptic_root or default_png_folder(args.panoptic_json)
        folders = Path(args.panoptic_json), Path(root), Path(args.images)
        return verify_panoptic_set(*folders, args.val_images)
    from focalnet_det.data.doctor.folder_doctor import verify_folders
    from focalnet_det.data.semantic.label_folders import read_class_list

    classes = read_class_list(args.classes, args.first_label)
    return verify_folders(args.sem_images, args.sem_labels, classes, args.val_images)


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        sys.exit(main())
