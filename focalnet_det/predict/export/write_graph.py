"""Write a model as a graph that other programs run: ONNX, or ``torch.export``."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import __version__
from ...atomic import replacing
from .graph_kinds import graph_model
from .graph_models import GraphModel
from .verify_graph import Arrays, Comparison, ExportError, Run, verify

ONNX, TORCH_EXPORT = ".onnx", ".pt2"
# Limit of the format of ONNX files, less some room for the graph.
MOST_BYTES = 2**31 - 2**24
# Key of our entry in the metadata of a file, JSON.
METADATA = "focalnet_det"


@dataclass(frozen=True)
class ExportReport:
    """Record of a written file.

    Attributes:
        path: of the file.
        outputs: names of the results.
        comparisons: of the file with the model.
    """

    path: Path
    outputs: tuple[str, ...]
    comparisons: list[Comparison]


def export_model(
    model: nn.Module,
    path: str | Path,
    *,
    description: Mapping[str, Any] | None = None,
    size: tuple[int, int] = (320, 416),
) -> ExportReport:
    """Write a model as a graph for any batch and image size, if the graph equals the model.

    The graph takes RGB images of 0..255 (a backbone: normalized images), normalizes and pads them
    itself, and gives boxes in pixels of its input. It is compared with the model on three sizes, a
    batch of two and an image without objects, before the file gets its name.

    Args:
        model: a meta-architecture or a backbone, on the CPU.
        path: ``.onnx``, which needs the extra ``export``, or ``.pt2`` for ``torch.export``.
        description: more entries for the metadata of the file, such as class names.
        size: (height, width) of the images that are recorded and compared first, pixels.
    Returns: what was written.
    Raises: ValueError for a model that cannot be exported, ExportError if the graph does not
        compute what the model does, ImportError if a library is missing. No file is written then.
    """
    path = Path(path)
    if path.suffix not in (ONNX, TORCH_EXPORT):
        raise ValueError(f"{path} must end in {ONNX}, or in {TORCH_EXPORT} for torch.export.")
    if path.suffix == ONNX:
        require_onnx()
        _check_size(model)
    graph = graph_model(model)
    program = record(graph, size)
    about = metadata(graph) | dict(description or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        if path.suffix == ONNX:
            write_onnx(program, graph, temporary, about)
            run = onnx_runner(temporary)
        else:
            extra = {f"{METADATA}.json": json.dumps(about)}
            with open(temporary, "wb") as file:
                torch.export.save(program, file, extra_files=extra)
            run = program_runner(temporary, graph.outputs)
        comparisons = verify(graph, model, run, verification_sizes(size))
    return ExportReport(path, graph.outputs, comparisons)


def _check_size(model: nn.Module) -> None:
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > MOST_BYTES:
        raise ValueError(
            f"The weights have {size / 1e9:.1f} GB, and an ONNX file holds at most 2 GB: write "
            f"{TORCH_EXPORT} instead."
        )


def require_onnx() -> None:
    """Raise ImportError with instructions if a library for ONNX is missing."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"Writing ONNX needs {', '.join(missing)}: pip install 'focalnet_det[export]'."
        )


def verification_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return three sizes: the given one, an odd smaller one, and the transposed one."""
    height, width = size
    return [size, (height * 4 // 5 | 1, width * 3 // 4 | 1), (width, height)]


def example_inputs(graph: GraphModel, size: tuple[int, int]) -> dict[str, Tensor]:
    """Return inputs to record a graph with.

    PyTorch takes a side of one for a constant, and equal sides for one number: there are two
    images, the coarsest map has at least three rows, and more columns.
    """
    stride = max(shape.stride for shape in _backbone(graph.model).output_shape().values())
    height, width = max(size[0], 3 * stride), max(size[1], 4 * stride)
    inputs = {"images": torch.zeros(2, graph.channels, height, width + (height == width))}
    if graph.has_threshold:
        inputs["threshold"] = torch.tensor(0.0)
    return inputs


def _backbone(model: Any) -> Any:
    """Return the backbone of a model, with its neck, or the backbone itself."""
    return getattr(model, "backbone", model)


def record(graph: GraphModel, size: tuple[int, int]) -> torch.export.ExportedProgram:
    """Record the graph of a model for any batch and image size.

    Raises: ValueError if PyTorch cannot record it, with its reason.
    """
    dynamic = torch.export.Dim.DYNAMIC
    inputs = example_inputs(graph, size)
    shapes: dict[str, Any] = dict.fromkeys(inputs)
    shapes["images"] = {0: dynamic, 2: dynamic, 3: dynamic}
    try:
        with torch.no_grad():
            return torch.export.export(
                graph, (), kwargs=inputs, dynamic_shapes=shapes, strict=False
            )
    except (RuntimeError, torch._dynamo.exc.UserError) as error:
        reason = " ".join(" ".join(str(error).split("\n")[:2]).split())
        kind = type(graph.model).__name__
        raise ValueError(f"torch.export cannot record this {kind}: {reason}") from error


def write_onnx(
    program: torch.export.ExportedProgram, graph: GraphModel, path: Path, about: Mapping[str, Any]
) -> None:
    """Translate a recorded graph to ONNX.

    Raises: ValueError for an operator that ONNX does not have.
    """
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        try:
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                output_names=list(graph.outputs),
            )
        except torch.onnx.errors.OnnxExporterError as error:
            reason = next(iter(str(error.__cause__ or error).strip().splitlines()), "")
            raise ValueError(f"Cannot be translated to ONNX: {reason}") from error
    assert onnx_program is not None
    onnx_program.model.metadata_props[METADATA] = json.dumps(about)
    onnx_program.save(str(path))


def onnx_runner(path: Path) -> Run:
    """Return a function that calls an ONNX file with onnxruntime, on the CPU.

    Raises: ExportError, also from the function, if onnxruntime cannot run the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    with _runtime_errors():
        session = onnxruntime.InferenceSession(
            path.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Arrays) -> Arrays:
        with _runtime_errors():
            return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    return run


@contextmanager
def _runtime_errors() -> Iterator[None]:
    """Turn the errors of onnxruntime, which have no class in common, into ours."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ExportError(f"onnxruntime cannot run the graph: {reason}") from error


def program_runner(path: Path, outputs: Sequence[str]) -> Run:
    """Return a function that calls a file of ``torch.export``."""
    with open(path, "rb") as file:
        module = torch.export.load(file).module()

    def run(inputs: Arrays) -> Arrays:
        tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
        with torch.inference_mode():
            results = module(**tensors)
        return {name: value.numpy() for name, value in zip(outputs, results, strict=True)}

    return run


def metadata(graph: GraphModel) -> dict[str, Any]:
    """Describe the inputs and results of a graph."""
    model = graph.model
    about: dict[str, Any] = {
        "version": __version__,
        "model": type(model).__name__,
        "outputs": list(graph.outputs),
        "images": "RGB, 0..255, float32, (N, C, H, W), resized; normalized in the graph",
    }
    if hasattr(model, "pixel_mean"):
        order = slice(None, None, -1 if graph.reverse_channels else 1)
        about["pixel_mean"] = model.pixel_mean.flatten().tolist()[order]
        about["pixel_std"] = model.pixel_std.flatten().tolist()[order]
    else:
        about["images"] = "normalized, float32, (N, C, H, W)"
    return about
