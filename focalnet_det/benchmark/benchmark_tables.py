"""Print and draw what `tools/benchmark.py` measures."""

import argparse
import json
from pathlib import Path
from typing import Any

from .backbone_speed import Timing


def print_table(timings: list[Timing], args: argparse.Namespace, where: str) -> None:
    """Print the timings as a table."""
    from rich.console import Console
    from rich.table import Table

    kind = "training step" if args.training else "inference"
    height, width = args.size
    title = f"{kind}, {args.batch_size} x {height} x {width}, {args.dtype}"
    if args.variant:
        title += f", {args.variant}"
    elif not args.detector:
        title += f", kernels {args.kernels}"
    table = Table(title=title, caption=where)
    for column in ("network", "ms", "spread, ms", "images/s", "ours is faster by", "kept, MiB",
                   "difference"):  # fmt: skip
        table.add_column(column, justify="left" if column == "network" else "right")
    for timing in timings:
        ratio, low, high = timings[0].ratio(timing)
        table.add_row(
            timing.name,
            f"{timing.median * 1e3:.0f}",
            f"{min(timing.seconds) * 1e3:.0f}-{max(timing.seconds) * 1e3:.0f}",
            f"{args.batch_size / timing.median:.2f}",
            f"{ratio:.2f} ({low:.2f}-{high:.2f})",
            "" if timing.saved_bytes is None else f"{timing.saved_bytes / 2**20:.0f}",
            "" if timing.difference is None else f"{timing.difference:.0e}",
        )
    Console(width=120).print(table)


def print_roofline(stages: Any, ceilings: Any) -> None:
    """Print the stages as a table."""
    from rich.console import Console
    from rich.table import Table

    title = (
        f"Roofline: {ceilings.macs / 1e9:.0f} GMAC/s in a matrix product, "
        f"{ceilings.bytes / 1e9:.1f} GB/s in a copy"
    )
    table = Table(title=title)
    for column in ("stage", "ms", "GMACs", "least MiB", "floor, ms", "reached"):
        table.add_column(column, justify="right")
    for stage in stages:
        table.add_row(
            stage.name, f"{stage.seconds * 1e3:.0f}", f"{stage.macs / 1e9:.1f}",
            f"{stage.least_bytes / 2**20:.0f}", f"{stage.floor * 1e3:.0f}",
            f"{stage.floor / stage.seconds:.0%}",
        )  # fmt: skip
    Console(width=120).print(table)


def print_products(args: argparse.Namespace, where: str) -> None:
    """Time matrix products by library and print them as a table."""
    from rich.console import Console
    from rich.table import Table

    from .product_speed import layers, time_products

    timings = time_products(layers(*args.size), args.repeats)
    table = Table(title="GFLOP/s of float32 products", caption=where)
    for column in ("layer", "rows", "weight", "product", *timings[0].seconds, "runs", "loss"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for timing in timings:
        name, rows, outputs, inputs = timing.layer
        operations = 2e-9 * rows * outputs * inputs
        table.add_row(
            name, str(rows), f"{outputs} x {inputs}", timing.kind,
            *(f"{operations / seconds:.0f}" for seconds in timing.seconds.values()),
            timing.choice, f"{timing.loss:.0%}",
        )  # fmt: skip
    Console(width=120).print(table)
    if args.json:
        report = [timing._asdict() | {"layer": timing.layer._asdict()} for timing in timings]
        args.json.write_text(json.dumps({"machine": where, "products": report}, indent=2) + "\n")


def plot(timings: list[Timing], file: Path, title: str) -> None:
    """Save a bar chart of the timings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(timings) + 1.5), layout="constrained")
    medians = [timing.median * 1e3 for timing in timings]
    low = [m - min(t.seconds) * 1e3 for m, t in zip(medians, timings, strict=True)]
    high = [max(t.seconds) * 1e3 - m for m, t in zip(medians, timings, strict=True)]
    axes.barh([timing.name for timing in timings], medians, xerr=(low, high), capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds; bars are medians, whiskers minimum and maximum")
    axes.set_title(title, fontsize=9)
    figure.savefig(file, dpi=150)
