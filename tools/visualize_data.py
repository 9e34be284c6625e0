#!/usr/bin/env python3
"""Draw training images as the model sees them: augmented, with boxes, masks and classes."""

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  # what a recipe does to its data set
  tools/visualize_data.py \\
      --config-file configs/Shapes-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_demo.py

  # your own data, with the options of tools/train_net.py
  tools/visualize_data.py \\
      --config-file configs/COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py \\
      --coco-json train.json --images train_images --count 24 --output samples.png

  # other augmentations
  tools/visualize_data.py --config-file CONFIG dataloader.train.augmentations.crop=512
"""


def main() -> None:
    """Run the tool."""
    # Next to this script.
    from train_net import OneLineParser, add_data_options

    parser = OneLineParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help=".py, .yaml, or a run's config.yaml"
    )
    parser.add_argument("--output", default="output/data.png", metavar="FILE", help="PNG")
    parser.add_argument("--count", type=int, default=16, metavar="N", help="images (default: 16)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, others")
    add_data_options(parser)
    parser.add_argument("opts", nargs="*", help="overrides, as for tools/train_net.py")
    args = vars(parser.parse_intermixed_args())
    path, count, seed = (args.pop(name) for name in ("output", "count", "seed"))

    from focalnet_det.engine.run_pictures import save_training_samples
    from focalnet_det.experiment.arguments import RunArguments

    number = save_training_samples(RunArguments(**args), Path(path), count=count, seed=seed)
    print(f"Drew {number} training samples: {path}")


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        main()
    sys.exit(0)
