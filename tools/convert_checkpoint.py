#!/usr/bin/env python3
"""Convert a checkpoint between public layouts, without changing any value."""

import argparse

EXAMPLES = """examples:
  tools/convert_checkpoint.py focalnet_tiny_lrf.pth --to timm --output tiny.safetensors
  tools/convert_checkpoint.py focalnet_tiny_lrf.in1k --to huggingface --output tiny_folder
  tools/convert_checkpoint.py mask_rcnn_epoch_12.pth --to detectron2 --output mask_rcnn.pth
  tools/convert_checkpoint.py output/mine/model_final.pth --to mmdet --output for_mmdet.pth
  tools/convert_checkpoint.py dino_focalnet_large.pth --to detectron2 --output dino.pth
"""
LAYOUTS = (
    *("official", "timm", "huggingface", "detectron2", "mmdet", "mmseg", "focalnet_dino", "detrex"),
    *("mask2former", "mask2former_old", "mask2former_transformers"),
)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", metavar="FILE", help="path, folder, URL or registered name")
    parser.add_argument(
        "--to", required=True, choices=LAYOUTS, help="mmdet and those after it: whole models"
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help=".safetensors, .pth, or a folder"
    )
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    from focalnet_det.checkpoint import convert_checkpoint

    print(convert_checkpoint(args.weights, args.output, args.to))


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        main()
