#!/usr/bin/env python3
"""Write a trained model, or a backbone, as a graph that other programs run."""

import argparse
import sys

EXAMPLES = """examples:
  # a trained model, for onnxruntime and others
  tools/export_model.py output/mine --output mine.onnx

  # for torch.export; recorded with images of the size that the model is used with
  tools/export_model.py output/mine --output mine.pt2 --size 800 1216

  # the backbone of a trained model, and one with public weights
  tools/export_model.py output/mine --backbone-only --output backbone.onnx
  tools/export_model.py --variant focalnet_tiny_lrf --weights focalnet_tiny_lrf.pth \\
      --output tiny.onnx
"""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", nargs="?", metavar="RUN", help="folder of a run, or a checkpoint")
    parser.add_argument("--output", required=True, metavar="FILE", help=".onnx or .pt2")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(320, 416),
        metavar=("H", "W"),
        help="of the images that are recorded and compared; the file takes any size",
    )
    parser.add_argument("--backbone-only", action="store_true", help="without neck and head")
    parser.add_argument("--config-file", metavar="FILE", help="of checkpoints without their config")
    parser.add_argument("--variant", metavar="NAME", help="a backbone instead of a run")
    parser.add_argument("--weights", metavar="FILE", help="of --variant; default: random")
    args = parser.parse_args()
    if (args.model is None) == (args.variant is None):
        raise ValueError("Name either a run or checkpoint, or a backbone with --variant.")
    if args.weights and args.variant is None:
        raise ValueError("--weights belongs to --variant; a run has its own.")
    if min(args.size) < 32:
        raise ValueError(f"--size must be 32 or more, not {min(args.size)}.")
    return args


def main() -> None:
    """Run the tool."""
    args = parse_args()
    from focalnet_det.predict.export.trained_graph import export_backbone, export_trained

    size = (args.size[0], args.size[1])
    if args.variant:
        report = export_backbone(args.variant, args.output, weights=args.weights, size=size)
    else:
        report = export_trained(
            args.model,
            args.output,
            config=args.config_file,
            backbone_only=args.backbone_only,
            size=size,
        )
    print(f"{report.path}: images -> {', '.join(report.outputs)}")
    for comparison in report.comparisons:
        count = comparison.detections
        compared = "" if count is None else f" {count} detections,"
        numbers = (f"{name} {value:.1e}" for name, value in comparison.differences.items())
        print(
            f"  {comparison.batch}:{compared} largest differences: {', '.join(numbers) or 'none'}"
        )


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        main()
    sys.exit(0)
