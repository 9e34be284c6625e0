"""Run all GPU measurements of ``docs/benchmarks/gpu.md``, each in a separate process."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from ..atomic import replacing
from ..resources import resource_folder

RECIPES = resource_folder("configs") / "COCO-InstanceSegmentation"
COMMON = "--device cuda --dtype bfloat16 --compile --peers timm transformers swin convnext resnet"


# Suffixes of settings with ``torch.compile``.
COMPILED = (", compiled", ", CUDA graphs")


class Case(NamedTuple):
    """A run of ``tools/benchmark.py``.

    Attributes:
        name: of the row.
        arguments: in addition to ``COMMON``.
        eager, compiled: target speed-up over the best peer of each kind.
    """

    name: str
    arguments: str
    eager: float
    compiled: float


_INFERENCE = "--size 800 1216 --batch-size"
_TRAINING = "--training --size 512 512 --batch-size 16"
CASES = (
    Case("inference, batch 1, kernels 3,5", f"{_INFERENCE} 1", 2.5, 1.2),
    Case("inference, batch 16, kernels 3,5", f"{_INFERENCE} 16 --roofline", 2.5, 1.2),
    Case("inference, batch 1, kernels 9,11,13", f"{_INFERENCE} 1 --kernels 9 11 13", 2.5, 1.5),
    Case("inference, batch 16, kernels 9,11,13", f"{_INFERENCE} 16 --kernels 9 11 13", 2.5, 1.5),
    Case("training step, kernels 3,5", _TRAINING, 2.0, 1.2),
    Case("training step, kernels 9,11,13", f"{_TRAINING} --kernels 9 11 13", 2.5, 1.5),
)
# Recipe and forced backend of each Mask R-CNN.
DETECTORS = (
    ("mask_rcnn_focalnet_tiny_srf_fpn_1x.py", ""),
    ("mask_rcnn_focalnet_tiny_srf_fpn_1x.py", "reference"),
    ("mask_rcnn_swin_tiny_fpn_1x.py", ""),
    ("mask_rcnn_resnet50_fpn_1x.py", ""),
)


def run(tool: Path, output: Path) -> None:
    """Run all cases, print two tables and write all results to a folder.

    Cases with an existing result file are skipped, so that an interrupted suite can be resumed.
    After a failure, the remaining cases still run.

    Args:
        tool: ``tools/benchmark.py``.
        output: folder for ``suite.json`` and a JSON file per case and detector.
    Raises: ChildProcessError at the end, if any case failed.
    """
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {"cases": [], "detectors": []}
    failed = []
    for number, case in enumerate(CASES):
        file = output / f"case{number}.json"
        command = [sys.executable, str(tool), *COMMON.split(), *case.arguments.split()]
        if _finished(case.name, file, [*command, "--json", str(file)]):
            results["cases"].append(ratios(case, json.loads(file.read_text())["timings"]))
        else:
            failed.append(case.name)
    with tempfile.TemporaryDirectory() as data:
        for number, (recipe, path) in enumerate(DETECTORS):
            file = output / f"detector{number}.json"
            command = [
                sys.executable, "-m", "focalnet_det.benchmark.detector_speed",
                "--config", str(RECIPES / recipe), "--data", data, "--json", str(file),
            ]  # fmt: skip
            if _finished(recipe, file, command, FOCALNET_DET_OPS=path):
                results["detectors"].append(json.loads(file.read_text()))
            else:
                failed.append(f"{recipe} {path}".strip())
    (output / "suite.json").write_text(json.dumps(results, indent=2))
    print_cases(results["cases"])
    print_detectors(results["detectors"])
    if failed:
        raise ChildProcessError(
            f"{len(failed)} benchmarks failed (see above): {'; '.join(failed)}."
        )


def _finished(name: str, file: Path, command: list[str], **variables: str) -> bool:
    """Run a benchmark unless its result file exists; return whether it succeeded."""
    if file.exists():
        print(f"{name}: using {file}; delete it to measure again")
        return True
    print(f"{name}: {' '.join(command)}", flush=True)
    try:
        with replacing(file, durable=False) as partial:
            command = [str(partial) if part == str(file) else part for part in command]
            subprocess.run(command, env=os.environ | variables, check=True)
    except subprocess.CalledProcessError as error:
        print(f"{name}: failed with exit code {error.returncode}", file=sys.stderr)
        return False
    except OSError as error:
        print(f"{name}: failed ({error})", file=sys.stderr)
        return False
    return True


def ratios(case: Case, timings: list[dict[str, Any]]) -> dict[str, Any]:
    """Compute the speed-up over the best peer FocalNet, eager and compiled, and the memory ratio.

    Eager peers are compared with our eager network, compiled ones with our fastest setting.

    Args:
        case: the measured case.
        timings: of a report of ``tools/benchmark.py``, starting with "ours".
    """
    ours, *others = timings
    kinds: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
        "eager": ([ours], []),
        "compiled": ([ours], []),
    }
    for timing in others:
        kind = "compiled" if timing["name"].endswith(COMPILED) else "eager"
        if timing["name"] in {f"ours{setting}" for setting in COMPILED}:
            kinds[kind][0].append(timing)
        elif timing["difference"] is not None and timing["name"] != "ours, lean":
            kinds[kind][1].append(timing)
    reference = next(t for t in others if t["name"] == "ours, reference")
    row: dict[str, Any] = {"case": case.name, "ms": ours["median"] * 1e3}
    for kind, target in (("eager", case.eager), ("compiled", case.compiled)):
        own, peers = (sorted(group, key=lambda t: t["median"]) for group in kinds[kind])
        row[kind] = peers[0]["median"] / own[0]["median"] if peers else None
        row[f"{kind} pair"] = f"{own[0]['name']} / {peers[0]['name']}" if peers else None
        row[f"{kind} target"] = target
    row["memory"] = (
        None if not reference["peak_bytes"] else ours["peak_bytes"] / reference["peak_bytes"]
    )
    return row


def print_cases(rows: list[dict[str, Any]]) -> None:
    """Print one row per case: speed-up, target, peer."""
    table = Table(title="FocalNet-T, bfloat16: speed-up over the best peer")
    for column in ("case", "ms", "eager", "compiled", "peak memory / reference"):
        table.add_column(column)
    for row in rows:
        cells = [
            "" if row[kind] is None
            else f"{row[kind]:.2f} (target {row[f'{kind} target']}) {row[f'{kind} pair']}"
            for kind in ("eager", "compiled")
        ]  # fmt: skip
        memory = "" if row["memory"] is None else f"{row['memory']:.2f}"
        table.add_row(row["case"], f"{row['ms']:.2f}", *cells, memory)
    Console(width=150).print(table)


def print_detectors(rows: list[dict[str, Any]]) -> None:
    """Print one row per detector."""
    table = Table(title="Mask R-CNN, training, bfloat16, 16 images of 800 x 1216")
    for column in (
        "recipe",
        "images/s",
        "waiting for data",
        "GPU busy",
        "peak GiB",
        "waits a step",
    ):
        table.add_column(column)
    table.add_column("ms of kernels, forward")
    for row in rows:
        parts = ", ".join(f"{name} {seconds * 1e3:.0f}" for name, seconds in row["parts"].items())
        table.add_row(
            row["name"], f"{row['images_per_second']:.1f}", f"{row['data_share']:.0%}",
            f"{row['busy_share']:.0%}", f"{row['peak_bytes'] / 2**30:.1f}", f"{row['waits']:.0f}",
            parts,
        )  # fmt: skip
    Console(width=150).print(table)
