"""Measure the throughput of all classifiers at several sizes, beside the published one."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..atomic import write_text
from ..backbones import list_backbones
from ..create import create_classifier

SIZES = (224, 448, 896)
# Images at the smallest size; larger images come in batches of as many pixels.
BASE_SIZE = 224
# Images per second on a V100, by size. Batch and precision are not stated.
# Source: microsoft/FocalNet:README.md; microsoft/Focal-Transformer:README.md.
PUBLISHED: dict[str, dict[int, int]] = {
    "focalnet_tiny_srf": {224: 743},
    "focalnet_tiny_lrf": {224: 696},
    "focalnet_small_srf": {224: 434},
    "focalnet_small_lrf": {224: 406},
    "focalnet_base_srf": {224: 280},
    "focalnet_base_lrf": {224: 269},
    "focalnet_tiny_iso": {224: 2334},
    "focalnet_small_iso": {224: 920},
    "focalnet_base_iso": {224: 300},
    "focal_tiny": {224: 319, 448: 105, 896: 27},
    "focal_small": {224: 192, 448: 63, 896: 17},
    "focal_base": {224: 138, 448: 44, 896: 11},
    "focal_fast_tiny": {224: 483},
    "focal_fast_small": {224: 293},
    "focal_fast_base": {224: 203},
}


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Throughput of a classifier at one size.

    Attributes:
        name: variant.
        size: side of the images, pixels.
        batch: images in a batch.
        dtype: of weights and images.
        machine: description.
        images_per_second: median over the repeats.
        parameters: with a head for 1,000 classes.
    """

    name: str
    size: int
    batch: int
    dtype: str
    machine: str
    images_per_second: float
    parameters: int

    @property
    def key(self) -> tuple[str, ...]:
        """Identify what was measured."""
        return (self.name, str(self.size), str(self.batch), self.dtype, self.machine)


def batch_of(size: int, base_batch: int) -> int:
    """Return the images of a batch with about as many pixels as ``base_batch`` at 224."""
    return max(1, base_batch * BASE_SIZE**2 // size**2)


def measure(
    name: str,
    sizes: Sequence[int],
    *,
    base_batch: int,
    device: torch.device,
    dtype: torch.dtype,
    machine: str,
    repeats: int,
) -> list[Throughput]:
    """Time inference of a classifier with random weights at each size.

    Args:
        name: variant.
        sizes: sides of the images, pixels.
        base_batch: images in a batch at 224, see :func:`batch_of`.
        device, dtype: of weights and images.
        machine: description, for the result.
        repeats: timed runs after one that is not timed.
    """
    if not sizes:
        return []
    net = create_classifier(name).eval().to(device, dtype)
    parameters = sum(p.numel() for p in net.parameters())
    results = []
    for size in sizes:
        batch = batch_of(size, base_batch)
        images = torch.randn(batch, 3, size, size, device=device).to(dtype)
        results.append(
            Throughput(
                name=name,
                size=size,
                batch=batch,
                dtype=str(dtype).removeprefix("torch."),
                machine=machine,
                images_per_second=batch / median_seconds(net, images, repeats),
                parameters=parameters,
            )
        )
    return results


@torch.inference_mode()
def median_seconds(net: nn.Module, images: torch.Tensor, repeats: int) -> float:
    """Return the median time of an inference, seconds, after one that is not timed."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        net(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def run(
    output: Path,
    *,
    pattern: str,
    sizes: Sequence[int],
    report: Callable[[str], None] = print,
    **setting: Any,
) -> Path:
    """Measure all variants of a pattern, and write ``throughput.json`` and ``throughput.md``.

    What ``throughput.json`` holds for the same machine, batch and type is not measured again.

    Args:
        output: folder.
        pattern: of variants, as in :func:`focalnet_det.list_backbones`.
        sizes: sides of the images, pixels.
        report: takes a line of progress.
        setting: the other arguments of :func:`measure`.
    Returns: path of the table.
    Raises: ValueError if no variant matches.
    """
    names = [name for name in list_backbones(pattern) if not name.endswith("_nano")]
    if not names:
        raise ValueError(f"No published variant matches {pattern!r}.")
    output.mkdir(parents=True, exist_ok=True)
    path = output / "throughput.json"
    rows = [Throughput(**row) for row in json.loads(path.read_text())] if path.exists() else []
    for name in names:
        measured = measure(name, unmeasured(name, sizes, rows, setting), **setting)
        rows += measured
        for row in measured:
            report(f"{name}, {row.size} px, batch {row.batch}: {row.images_per_second:.2f} img/s")
        write_text(path, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    table = throughput_table(rows, sizes)
    write_text(output / "throughput.md", table)
    report(table)
    return output / "throughput.md"


def unmeasured(
    name: str, sizes: Sequence[int], rows: Sequence[Throughput], setting: Mapping[str, Any]
) -> list[int]:
    """Return the sizes of a variant that no row of this setting has."""
    done = {row.key for row in rows}
    kind = str(setting["dtype"]).removeprefix("torch.")
    batches = {size: str(batch_of(size, setting["base_batch"])) for size in sizes}
    return [
        size
        for size, batch in batches.items()
        if (name, str(size), batch, kind, setting["machine"]) not in done
    ]


def throughput_table(rows: Sequence[Throughput], sizes: Sequence[int]) -> str:
    """Format results as Markdown, a table per machine and type, beside the published numbers."""
    parts = []
    for machine, dtype in dict.fromkeys((row.machine, row.dtype) for row in rows):
        found = {
            (row.name, row.size): row
            for row in rows
            if (row.machine, row.dtype) == (machine, dtype)
        }
        header = ["variant", "parameters, M"]
        header += [text for size in sizes for text in (f"{size} px", "V100, published")]
        lines = [f"Images per second, {dtype}, on {machine}:", ""]
        lines += [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
        for name in dict.fromkeys(name for name, _ in found):
            cells = [name, f"{next(r for r in rows if r.name == name).parameters / 1e6:.1f}"]
            for size in sizes:
                row, published = found.get((name, size)), PUBLISHED.get(name, {}).get(size)
                cells.append("" if row is None else f"{row.images_per_second:.4g}")
                cells.append("" if published is None else str(published))
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
