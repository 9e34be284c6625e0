#!/usr/bin/env python3
"""Analyze a backbone: parameters, multiply-accumulates and memory by stage, effect of padding."""

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from focalnet_det.analysis import BackboneCost
    from focalnet_det.backbones import StagedBackbone

EXAMPLES = """examples:
  tools/analyze_model.py focalnet_tiny_lrf
  tools/analyze_model.py focalnet_large_fl4 --size 800 1280 --json
  tools/analyze_model.py --size 800 1280 \\
      --config-file configs/COCO-InstanceSegmentation/mask_rcnn_focalnet_tiny_srf_fpn_1x.py
  tools/analyze_model.py focalnet_tiny_lrf --weights focalnet_tiny_lrf.pth --padding 32 200
  tools/analyze_model.py --padding 200 --weights output/demo/model_final.pth \\
      --config-file configs/Shapes-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_demo.py
"""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("variant", nargs="?", metavar="VARIANT", help="name of a backbone")
    what.add_argument("--config-file", metavar="FILE", help=".py or .yaml; needs Detectron2")
    parser.add_argument("--size", type=int, nargs=2, default=(224, 224), metavar=("H", "W"))
    parser.add_argument("--batch-size", type=int, default=1, metavar="N")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--padding",
        type=int,
        nargs="+",
        metavar="N",
        help="report how much N pixels of batch padding change the features of an image (noise of "
        "--size); with --config-file and --weights also AP on the test sets",
    )
    parser.add_argument("--weights", metavar="FILE", help="for --padding; default: random")
    args = parser.parse_args()
    if args.weights and not args.padding:
        parser.error("--weights requires --padding.")
    return args


def load(args: argparse.Namespace) -> tuple["StagedBackbone", dict[str, int]]:
    """Build the backbone, and count the parameters of each part of its detector, if any."""
    import torch

    from focalnet_det import create_backbone
    from focalnet_det.analysis import component_parameters
    from focalnet_det.backbones import StagedBackbone

    if args.config_file is None:
        with torch.device("meta"):
            return create_backbone(args.variant), {}
    from focalnet_det.experiment import load_config, read_experiment

    model = read_experiment(load_config(args.config_file, [])).model()
    for module in model.modules():
        if isinstance(module, StagedBackbone):
            return module, component_parameters(model)
    raise ValueError(f"The model of {args.config_file} has no backbone of this package.")


def print_json(cost: "BackboneCost", components: dict[str, int]) -> None:
    """Print the costs as JSON."""
    names = "parameters", "macs", "activation_bytes", "reference_activation_bytes"
    totals = {name: getattr(cost, name) for name in names}
    print(json.dumps(dataclasses.asdict(cost) | totals | {"components": components}, indent=2))


def print_table(cost: "BackboneCost", components: dict[str, int]) -> None:
    """Print the costs as a table."""
    from rich.console import Console
    from rich.table import Table

    height, width = cost.size
    table = Table(title=f"Backbone, {cost.batch_size} x {height} x {width}", show_footer=True)
    table.add_column("part", footer="total")
    table.add_column("output (H, W, C)", justify="right")
    for title, total in (
        ("parameters", f"{cost.parameters:,}"),
        ("GMACs", f"{cost.macs / 1e9:.3f}"),
        ("activations, MiB", f"{cost.activation_bytes / 2**20:.1f}"),
        ("reference, MiB", f"{cost.reference_activation_bytes / 2**20:.1f}"),
    ):
        table.add_column(title, footer=total, justify="right")
    for part in cost.parts:
        table.add_row(
            part.name,
            " x ".join(map(str, part.output_shape[1:])),
            f"{part.parameters:,}",
            f"{part.macs / 1e9:.3f}",
            f"{part.activation_bytes / 2**20:.1f}",
            f"{part.reference_activation_bytes / 2**20:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(f"Counter: {cost.counter}. Activations: tensors saved for the backward pass by")
    console.print("the fused backends, and by the reference (see docs/performance.md).")
    for name, count in components.items():
        console.print(f"Parameters of {name}: {count:,}")


def report_padding(args: argparse.Namespace) -> None:
    """Print the effect of padding as a table or as JSON."""
    import torch

    from focalnet_det import create_backbone
    from focalnet_det.analysis.feature_shifts import feature_shifts
    from focalnet_det.backbones import StagedBackbone

    scores: list[dict[str, object]] = []
    torch.manual_seed(0)
    if args.config_file is None:
        net = create_backbone(args.variant, weights=args.weights)
    else:
        from focalnet_det.engine.padding_robustness import scores_under_padding, weighted_model

        experiment, model = weighted_model(args.config_file, args.weights)
        net = next(m for m in model.modules() if isinstance(m, StagedBackbone))
        if args.weights:
            scores = scores_under_padding(experiment, model, args.padding)
    shifts = feature_shifts(net.cpu(), torch.randn(3, *args.size), args.padding)
    if args.json:
        print(json.dumps({"features": [dataclasses.asdict(s) for s in shifts], "scores": scores}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("feature", "padding, px", "change, %", "with valid_context, %")
    for s in shifts:
        row = (f"{100 * s.plain:.3f}", f"{100 * s.valid:.3f}")
        table.add_row(s.feature, str(s.pixels), *row)
    console = Console()
    console.print(table)
    for score in scores:
        console.print("{data} {task}: AP {AP:.2f} at {pixels} px".format(**score))


def main() -> None:
    """Run the tool."""
    args = parse_args()
    if args.padding:
        report_padding(args)
        return
    from focalnet_det.analysis import analyze_backbone

    net, components = load(args)
    cost = analyze_backbone(net, tuple(args.size), batch_size=args.batch_size)
    (print_json if args.json else print_table)(cost, components)


if __name__ == "__main__":
    from focalnet_det.errors import one_line_errors

    with one_line_errors():
        main()
