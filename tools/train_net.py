#!/usr/bin/env python3
"""Train or evaluate a detector, segmentor or classifier from a .py or .yaml config."""

import argparse
import sys
from typing import Any, NoReturn

EXAMPLES = """examples:
  # the published recipe on 8 GPUs, with COCO in $DETECTRON2_DATASETS
  tools/train_net.py --num-gpus 8 \\
      --config-file configs/COCO-InstanceSegmentation/mask_rcnn_focalnet_tiny_srf_fpn_1x.py \\
      train.init_checkpoint=focalnet_tiny_srf.pth

  # your own data in COCO format: class count and names come from the file
  tools/train_net.py \\
      --config-file configs/COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py \\
      --coco-json train.json --images train_images --val-json val.json --val-images val_images

  # your own COCO panoptic files: things and stuff come from the file
  tools/train_net.py \\
      --config-file configs/Shapes-PanopticSegmentation/panoptic_fpn_focalnet_nano_small.py \\
      --panoptic-json panoptic_train.json --panoptic-root panoptic_train --images train_images \\
      --val-panoptic-json panoptic_val.json --val-panoptic-root panoptic_val \\
      --val-images val_images

  # your own label maps (1 = first class, 0 and 255 = ignored)
  tools/train_net.py \\
      --config-file configs/ADE20K-SemanticSegmentation/upernet_focalnet_nano_small.py \\
      --sem-images train --sem-labels train_labels \\
      --val-sem-images val --val-sem-labels val_labels \\
      --classes classes.txt --first-label 1

  # a small box detector for data without masks
  tools/train_net.py --config-file configs/COCO-Detection/retinanet_focalnet_nano_fpn_small.py \\
      --coco-json train.json --images train_images --val-json val.json --val-images val_images

  # your own classes: a folder of images per class
  tools/train_net.py \\
      --config-file configs/Shapes-Classification/classifier_focalnet_nano_small.py \\
      --class-images train --val-class-images val

  # pretrain on your own images without labels, then train a detector from the result
  tools/train_net.py \\
      --config-file configs/Shapes-Pretraining/simmim_focalnet_nano_small.py \\
      --unlabeled-images photos --output output/pretrained
  tools/train_net.py \\
      --config-file configs/COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py \\
      --coco-json train.json --images train_images \\
      train.init_checkpoint=output/pretrained/model_final.pth

  # repeat a run: its saved config includes the data
  tools/train_net.py --config-file output/mine/config.yaml --output output/again

  # evaluate a run: its best weights, or the last ones
  tools/train_net.py --eval-only --config-file output/mine/config.yaml --output output/mine

  # evaluate a checkpoint
  tools/train_net.py --config-file CONFIG --eval-only train.init_checkpoint=output/model_final.pth
"""


class OneLineParser(argparse.ArgumentParser):
    """Argument parser that reports errors in one line, like all tools."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError instead of printing the usage."""
        raise ValueError(f"{message} (--help lists the options)")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = OneLineParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help=".py, .yaml, or a run's config.yaml"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate the run in --output, or the initial weights",
    )
    parser.add_argument("--output", metavar="DIR", help="output folder, instead of the config's")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="delete an earlier run in the output folder instead of moving its files",
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="reproduce results bitwise, also on GPUs"
    )
    parser.add_argument(
        "--report", action="store_true", help="write an HTML report per test set at the end"
    )
    add_data_options(parser)
    add_image_options(parser)
    scale = parser.add_argument_group("several GPUs")
    scale.add_argument("--num-gpus", type=int, default=1, metavar="N", help="per machine")
    scale.add_argument("--num-cpus", type=int, default=0, metavar="N", help="CPU processes instead")
    scale.add_argument("--num-machines", type=int, default=1, metavar="M")
    scale.add_argument("--machine-rank", type=int, default=0, metavar="R")
    scale.add_argument("--dist-url", default="auto", metavar="URL", help="of the first machine")
    parser.add_argument(
        "opts",
        nargs="*",
        help="overrides: key=value for a .py config, KEY VALUE for a .yaml config",
    )
    # Options may follow overrides.
    return parser.parse_intermixed_args()


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for custom data."""
    data = parser.add_argument_group("your own data, COCO format (repeatable)")
    several: dict[str, Any] = {"action": "append", "default": []}
    data.add_argument("--coco-json", metavar="FILE", help="training annotations", **several)
    data.add_argument("--images", metavar="DIR", help="training images", **several)
    data.add_argument("--val-json", metavar="FILE", help="validation annotations", **several)
    data.add_argument("--val-images", metavar="DIR", help="default: those of --images", **several)
    segments = parser.add_argument_group(
        "your own data, COCO panoptic format, with the image folders"
    )
    segments.add_argument("--panoptic-json", metavar="FILE", help="training segments", **several)
    segments.add_argument("--panoptic-root", metavar="DIR", help="PNGs of the training", **several)
    segments.add_argument("--val-panoptic-json", metavar="FILE", help="validation", **several)
    segments.add_argument("--val-panoptic-root", metavar="DIR", help="PNGs of it", **several)
    labels = parser.add_argument_group("your own data, folders of images and label maps")
    labels.add_argument("--sem-images", metavar="DIR", help="training images", **several)
    labels.add_argument("--sem-labels", metavar="DIR", help="pixel values = classes", **several)
    labels.add_argument("--val-sem-images", metavar="DIR", help="validation images", **several)
    labels.add_argument("--val-sem-labels", metavar="DIR", help="validation labels", **several)
    labels.add_argument("--classes", metavar="FILE", help="one name per line, or a JSON list")
    labels.add_argument(
        "--first-label",
        type=int,
        choices=(0, 1),
        help="value of the first class; with 1, 0 is ignored",
    )


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for custom images: with a class each, or without labels."""
    several: dict[str, Any] = {"action": "append", "default": [], "metavar": "DIR"}
    classes = parser.add_argument_group("your own classes: folders, .tar or .zip of class folders")
    classes.add_argument("--class-images", help="training folders; see --classes", **several)
    classes.add_argument("--val-class-images", help="validation folders", **several)
    images = parser.add_argument_group("your own images without labels, for pretraining")
    images.add_argument("--unlabeled-images", help="folder, .tar or .zip", **several)
    images.add_argument("--val-unlabeled-images", help="to reconstruct at the end", **several)


def main() -> None:
    """Run the tool."""
    args = parse_args()
    from focalnet_det.engine.launch import launch_run
    from focalnet_det.engine.main import RunArguments

    launch_run(RunArguments(**vars(args)))


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        main()
    sys.exit(0)
