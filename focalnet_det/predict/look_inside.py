"""The command line of tools/visualize_modulation.py."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from ..backbones import list_backbones
from ..create import create_backbone
from ..visualization.draw_modulation import draw_maps, level_names
from ..visualization.figures import save_figure
from ..visualization.modulation_maps import BlockMaps, field_side, modulation_maps, receptive_field
from .predictor import Predictor, to_picture
from .why import ImageMaps, modulation_of_image, why_box

# Statistics of ImageNet, RGB, which public weights were trained with.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
EXAMPLES = """examples:
  # gates of each level, modulator, receptive field and kernels of a trained model
  tools/visualize_modulation.py output/mine photo.jpg

  # why the detector found its first box: levels and places that the gates draw on
  tools/visualize_modulation.py output/mine photo.jpg --box 0

  # any box: left, top, right, bottom in pixels of the photo
  tools/visualize_modulation.py output/mine photo.jpg --region 40,30,180,200

  # a backbone alone, with public weights
  tools/visualize_modulation.py focalnet_tiny_lrf photo.jpg --weights focalnet_tiny_lrf.pth
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what the modulations of a model compute for an image, and print the numbers.

    Args:
        argv: arguments; None for those of the process.
    Raises: ValueError or OSError with a message for the user.
    """
    args = _parser().parse_args(argv)
    if args.model in list_backbones():
        _draw_backbone(args)
        return
    if args.weights:
        raise ValueError("--weights is for a backbone: a run or a checkpoint has its own.")
    predictor = Predictor(
        args.model, config=args.config_file, device=args.device, threshold=args.threshold
    )
    if args.box is None and args.region is None:
        point = None if args.at is None else _numbers(args.at, 2, "--at")
        _save_maps(args, modulation_of_image(predictor, args.image, point))
    else:
        _explain(predictor, args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="visualize_modulation",
        description="Look inside focal modulation: gates, modulators, receptive fields and kernels "
        "of a FocalNet, and why a box was found.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", metavar="RUN", help="folder of a run, a checkpoint, or the name of a backbone"
    )
    parser.add_argument("image", help="image file")
    parser.add_argument("--output", default="output/modulation.png", metavar="FILE", help="PNG")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--box", type=int, metavar="N", help="explain detection N, the best is 0")
    what.add_argument("--region", metavar="X0,Y0,X1,Y1", help="explain a box of your own, pixels")
    what.add_argument("--at", metavar="X,Y", help="of the receptive fields; default: the middle")
    parser.add_argument("--all-blocks", action="store_true", help="not only the last of each stage")
    parser.add_argument("--threshold", type=float, default=0.5, metavar="S", help="of detections")
    parser.add_argument("--weights", metavar="FILE", help="of a backbone; random ones without")
    parser.add_argument("--config-file", metavar="FILE", help="of checkpoints without their config")
    parser.add_argument("--device", metavar="NAME", help="default: a GPU if there is one")
    return parser


def _numbers(text: str, count: int, option: str) -> Any:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        raise ValueError(f"{option} {text}: give {count} numbers with commas between, in pixels.")
    return numbers


def _explain(predictor: Predictor, args: argparse.Namespace) -> None:
    if args.region is not None:
        box, name = _numbers(args.region, 4, "--region"), None
    else:
        prediction = predictor(args.image)
        count = len(prediction.instances)
        if not 0 <= args.box < count:
            raise ValueError(
                f"--box {args.box}: the model finds {count} objects with a score of at least "
                f"{args.threshold:.0%}, numbered from 0; --threshold changes that."
            )
        box = prediction.instances.pred_boxes.tensor[args.box].tolist()
        name = prediction.names[args.box]
    explanation = why_box(predictor, args.image, box, name)
    save_figure(explanation.figure(), Path(args.output))
    print(explanation.title)
    print(explanation.table())
    print(f"Saved {args.output}.")


def _draw_backbone(args: argparse.Namespace) -> None:
    for option in ("box", "region"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option} needs a trained detector: give the folder of a run.")
    backbone = create_backbone(args.model, weights=args.weights).to(args.device or "cpu").eval()
    image = np.asarray(to_picture(args.image))
    pixels = (torch.from_numpy(image.copy()).float() - torch.tensor(MEAN)) / torch.tensor(STD)
    inputs = pixels.permute(2, 0, 1)[None].to(args.device or "cpu")
    height, width = image.shape[:2]
    point = (width / 2, height / 2) if args.at is None else _numbers(args.at, 2, "--at")
    maps = modulation_maps(backbone, lambda: backbone(inputs))
    fields = {
        name: receptive_field(backbone, inputs, name, point) for name in backbone.output_shape()
    }
    _save_maps(args, ImageMaps(image=image, maps=maps, fields=fields, point=point))


def _save_maps(args: argparse.Namespace, inside: ImageMaps) -> None:
    last = {block.stage: block for block in inside.maps}
    chosen = list(inside.maps) if args.all_blocks else list(last.values())
    save_figure(draw_maps(inside.image, chosen, inside.fields), Path(args.output))
    print(_table(chosen))
    for name, field in inside.fields.items():
        sides = [field_side(field, inside.point, share) for share in (0.5, 0.95)]
        print(
            f"Receptive field of {name}: half of it within {sides[0]} px, 95 % within {sides[1]}."
        )
    print(f"Saved {args.output}.")


def _table(maps: Sequence[BlockMaps]) -> str:
    rows = []
    for block in maps:
        shares = block.contributions.sum((1, 2)) / block.contributions.sum().clamp(min=1e-12)
        names = level_names(len(block.gates))
        sides = [*(len(kernel) * block.stride for kernel in block.spread), None]
        for name, side, gate, share in zip(names, sides, block.gates, shares, strict=True):
            reach = "everywhere" if side is None else f"{side} px"
            where = f"{block.stage}.{block.block + 1}"
            rows.append([where, name, reach, f"{float(gate.mean()):+.3f}", f"{float(share):.1%}"])
    header = ["block", "level", "reach", "mean gate", "share of the context"]
    return tabulate(rows, header, stralign="right", disable_numparse=True)
