#!/usr/bin/env python3
"""Predict images, folders and videos with a trained model."""

import argparse
import sys
from pathlib import Path

EXAMPLES = """examples:
  # a folder of pictures, with the best weights of a run
  tools/predict.py output/mine photos --output output/photos

  # some pictures and a video, certain objects alone
  tools/predict.py output/mine 'photos/*.jpg' walk.mp4 --threshold 0.8

  # numbers only: predictions.json in COCO's format, label PNGs of semantic and panoptic models
  tools/predict.py output/mine photos --no-pictures --batch-size 8

  # a camera, until Ctrl-C
  tools/predict.py output/mine --camera 0
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="RUN", help="folder of a run, or a checkpoint")
    parser.add_argument(
        "inputs", nargs="*", help="images, videos, folders, patterns, .txt files with a path a line"
    )
    parser.add_argument("--output", default="output/predictions", metavar="DIR")
    parser.add_argument(
        "--threshold", type=float, default=0.5, metavar="S", help="least score of instances"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N")
    parser.add_argument("--device", metavar="NAME", help="default: a GPU if there is one")
    parser.add_argument("--config-file", metavar="FILE", help="of checkpoints without their config")
    parser.add_argument("--no-pictures", action="store_true", help="draw nothing")
    parser.add_argument(
        "--overwrite", action="store_true", help="begin anew; without it, an earlier job goes on"
    )
    parser.add_argument("--camera", type=int, metavar="N", help="record camera N until Ctrl-C")
    args = parser.parse_args()
    if not args.inputs and args.camera is None:
        raise ValueError("Nothing to predict: name images, folders or videos, or --camera 0.")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be 1 or more, not {args.batch_size}.")
    return args


def main() -> None:
    args = parse_args()

    from focalnet_det.predict import Predictor
    from focalnet_det.predict.job import JobOptions, predict_camera, predict_sources

    predictor = Predictor(
        args.model, config=args.config_file, device=args.device, threshold=args.threshold
    )
    options = JobOptions(
        output=Path(args.output),
        batch_size=args.batch_size,
        pictures=not args.no_pictures,
        overwrite=args.overwrite,
    )
    print(f"Weights: {predictor.checkpoint}")
    if args.inputs:
        done = predict_sources(predictor, args.inputs, options)
        earlier = f", {done.skipped} of them by an earlier start" if done.skipped else ""
        print(f"Predicted {done.predicted} files{earlier}: {args.output}")
        for path in done.files:
            print(f"  {path}")
        if done.errors:
            print(f"Could not read {len(done.errors)} files:")
            for name, error in done.errors.items():
                print(f"  {name}: {error}")
    if args.camera is not None:
        print(predict_camera(predictor, args.camera, options))


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        main()
    sys.exit(0)
