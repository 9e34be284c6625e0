"""Exported files equal their models, or are not written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det import create_backbone
from focalnet_det.experiment import load_config, read_experiment
from focalnet_det.predict.export import ExportError, export_model
from focalnet_det.predict.export.graph_kinds import graph_model
from focalnet_det.predict.export.verify_graph import BOX_TOLERANCE, TOLERANCE, verify
from focalnet_det.predict.export.write_graph import METADATA
from focalnet_det.predict.predictor import Predictor
from tests.helpers.paths import CONFIGS, ROOT, TOOLS
from tests.helpers.processes import run_program

NECK = ["model.backbone.bottom_up.embed_dim=8", "model.backbone.bottom_up.depths=[1,1,1,1]"]
PLAIN = ["model.backbone.embed_dim=8", "model.backbone.depths=[1,1,1,1]"]
R_CNN = [
    *NECK,
    *("model.proposal_generator.post_nms_topk=[50,20]", "model.roi_heads.num_classes=3"),
]
# Config and overrides that make the model small, by the name in the table of docs/export.md.
MODELS: dict[str, tuple[str, list[str]]] = {
    "UPerNet": (
        "ADE20K-SemanticSegmentation/upernet_focalnet_nano_small.py",
        [*PLAIN, "model.channels=16"],
    ),
    "Semantic FPN": ("Shapes-SemanticSegmentation/semantic_fpn_focalnet_nano_small.py", NECK),
    "RetinaNet": ("COCO-Detection/retinanet_focalnet_nano_fpn_small.py", NECK),
    "Mask R-CNN": ("COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py", R_CNN),
}


# Models whose wrapper is compared with them here, and their files in `make soak`.
FURTHER = {
    "Cascade Mask R-CNN, mmdet's": (
        "COCO-InstanceSegmentation/cascade_mask_rcnn_focalnet_tiny_lrf_fpn_3x.py",
        [
            *R_CNN,
            "model.backbone.out_channels=16",
            "model.proposal_generator.head.in_channels=16",
            *(
                f"model.roi_heads.box_heads.{k}.{field}"
                for k in range(3)
                for field in ("input_shape.channels=16", "conv_dims=[8]", "fc_dims=[16]")
            ),
            *(
                f"model.roi_heads.box_predictors.{k}.{field}"
                for k in range(3)
                for field in ("input_shape.channels=16", "test_topk_per_image=9")
            ),
            *(
                f"model.roi_heads.mask_heads.{k}.{field}"
                for k in range(3)
                for field in ("input_shape.channels=16", "conv_dims=[8,8]")
            ),
        ],
    ),
    "Cascade Mask R-CNN, Detectron2's": (
        "Shapes-InstanceSegmentation/cascade_mask_rcnn_focalnet_nano_fpn_small.py",
        R_CNN,
    ),
    "Panoptic FPN": ("Shapes-PanopticSegmentation/panoptic_fpn_focalnet_nano_small.py", R_CNN),
    "RetinaNet, mmdet's": (
        "COCO-Detection/retinanet_focalnet_tiny_srf_fpn_1x.py",
        [
            *NECK,
            "model.backbone.out_channels=16",
            "model.head.conv_dims=[16]",
            *(f"model.head.input_shape.{k}.channels=16" for k in range(5)),
            "model.num_classes=3",
        ],
    ),
    "FCOS": (
        "COCO-Detection/fcos_focalnet_tiny_srf_fpn_1x.py",
        [
            *NECK,
            "model.backbone.out_channels=64",
            "model.head.conv_dims=[64]",
            *(f"model.head.input_shape.{k}.channels=64" for k in range(5)),
        ],
    ),
    "Mask2Former": ("Shapes-PanopticSegmentation/mask2former_focalnet_nano_small.py", PLAIN),
}

# The file that is written and run in every test run; the others take half a minute each.
ALWAYS = ("UPerNet",)
# Its wrapper equals it, but not what ONNX makes of that.
REFUSED = "Mask2Former"
REASON = (
    "translated to ONNX, the sizes at which its levels are split become constants, and the "
    "comparison refuses the file"
)
Train = Callable[[str], Path]


def small(name: str) -> nn.Module:
    config, overrides = (MODELS | FURTHER)[name]
    return read_experiment(load_config(CONFIGS / config, overrides)).model().eval()


def needs_onnx() -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason="ONNX is missing: pip install '.[export]'")


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name in MODELS | FURTHER if name != REFUSED])
def test_onnx_equals_the_model(name: str, tmp_path: Path) -> None:
    needs_onnx()
    path = tmp_path / "model.onnx"
    report = export_model(small(name), path, description={"names": ["a", "ö"]}, size=(64, 96))
    assert [c.batch for c in report.comparisons][:4] == [
        *("1 x 64 x 96", "1 x 51 x 73", "1 x 96 x 64", "2 x 64 x 96")
    ]
    assert report.comparisons[-1].batch.endswith("empty")
    for comparison in report.comparisons:
        assert comparison.problems() == []
    if "boxes" in report.outputs:
        counts = [comparison.detections for comparison in report.comparisons]
        assert min(counts[:-1]) > 0
        assert counts[-1] == 0
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    about = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    assert about["names"] == ["a", "ö"]
    assert about["pixel_mean"] == pytest.approx([123.675, 116.28, 103.53], abs=1e-3)
    assert about["outputs"] == [output.name for output in session.get_outputs()]


@pytest.mark.soak
def test_a_graph_that_the_runtime_refuses_is_not_written(tmp_path: Path) -> None:
    needs_onnx()
    with pytest.raises(ExportError, match="onnxruntime cannot run the graph: .*Split"):
        export_model(small(REFUSED), tmp_path / "x.onnx", size=(64, 96))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_is_exported_by_the_tool(trained: Train, tmp_path: Path) -> None:
    """UPerNet; the file has what its user needs."""
    needs_onnx()
    import onnxruntime

    run, path = trained("upernet"), tmp_path / "new/upernet.onnx"
    done = run_program(TOOLS / "export_model.py", run, "--output", path, "--size", 64, 96)
    assert done.returncode == 0, done.stderr
    assert f"{path}: images -> logits\n  1 x 64 x 96: largest differences: logits " in done.stdout
    session = onnxruntime.InferenceSession(path)
    about = json.loads(session.get_modelmeta().custom_metadata_map[METADATA])
    predictor = Predictor(run, device="cpu")
    assert about["stuff_classes"] == predictor.metadata.stuff_classes
    assert about["short_side"] == 96
    # A picture that need not be resized.
    picture = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    images = picture.transpose(2, 0, 1)[None].astype(np.float32)
    (logits,) = session.run(None, {"images": images})
    expected = predictor(picture)["sem_seg"].numpy()
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-4)


def test_wrong_commands_are_one_line(tmp_path: Path) -> None:
    for arguments, message in {
        (): "Name either a run or checkpoint, or a backbone",
        ("run", "--weights", "x"): "--weights belongs to --variant",
        ("run", "--size", 8, 64): "--size must be 32 or more, not 8",
        (tmp_path / "none",): "does not exist",
    }.items():
        done = run_program(TOOLS / "export_model.py", *arguments, "--output", tmp_path / "x.onnx")
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_backbone_is_written_for_torch_export(tmp_path: Path) -> None:
    net = create_backbone("focalnet_tiny_lrf", embed_dim=8, depths=(1, 1, 1, 1)).eval()
    report = export_model(net, tmp_path / "net.pt2", size=(64, 96))
    assert report.outputs == ("stage1", "stage2", "stage3", "stage4")
    program = torch.export.load(tmp_path / "net.pt2").module()
    x = torch.rand(3, 3, 45, 70)
    with torch.no_grad():
        expected = net(x).values()
        for actual, feature in zip(program(images=x), expected, strict=True):
            torch.testing.assert_close(actual, feature, rtol=1e-4, atol=1e-5)


class Broken(nn.Module):
    """A wrapper whose graph is not what the model computes."""

    def __init__(self, graph: Any, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> None:
        super().__init__()
        self.wrapped, self.change = graph, change
        for name in ("outputs", "has_threshold", "reverse_channels", "channels"):
            setattr(self, name, getattr(graph, name))

    @property
    def model(self) -> Any:
        return self.wrapped.model

    def forward(self, images: torch.Tensor) -> tuple[Any, ...]:
        return self.change(self.wrapped(images))


def test_a_broken_graph_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool is given a graph that adds 0.001 to a feature."""
    from focalnet_det.predict.export import write_graph

    def wrong(model: nn.Module) -> nn.Module:
        return Broken(graph_model(model), lambda features: (features[0] + 1e-3, *features[1:]))

    monkeypatch.setattr(write_graph, "graph_model", wrong)
    net = create_backbone(
        "focalnet_nano", embed_dim=8, depths=(1, 1, 1, 1), out_features=("stage1",)
    ).eval()
    with pytest.raises(ExportError, match="does not compute what the model does: stage1 differ"):
        export_model(net, tmp_path / "net.pt2", size=(64, 64))
    assert list(tmp_path.iterdir()) == []


def eager(graph: Any) -> Callable[[Any], Any]:
    """Call a graph as a runtime does."""

    def run(inputs: Any) -> Any:
        tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
        with torch.no_grad():
            results = graph(**tensors)
        return dict(zip(graph.outputs, (value.numpy() for value in results), strict=True))

    return run


def changed(results: Any, name: str, change: Callable[[Any], Any]) -> Any:
    return {**results, name: change(results[name])}


def test_every_kind_of_difference_is_found() -> None:
    """Without ONNX: the wrapper itself, and what a faulty runtime would make of its results."""
    model = small("Mask R-CNN")
    graph = graph_model(model)
    run = eager(graph)
    sizes = [(64, 96), (51, 73), (96, 64)]
    for comparison in verify(graph, model, run, sizes):
        assert max(comparison.differences.values(), default=0) < min(TOLERANCE, BOX_TOLERANCE)

    def drop_one(classes: Any) -> Any:
        return np.where(np.arange(classes.shape[1]) == 0, -1, classes)

    faults: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "numbers of detections differ": ("classes", drop_one),
        "classes differ": ("classes", lambda c: np.where(c >= 0, (c + 1) % 3, c)),
        "boxes differ": ("boxes", lambda b: b + 0.02),
        "scores differ": ("scores", lambda s: s + 2e-4),
        "masks differ": ("masks", lambda m: m + 2e-4),
    }
    for message, (name, change) in faults.items():
        with pytest.raises(ExportError, match=message):
            verify(graph, model, lambda inputs: changed(run(inputs), name, change), sizes[:1])  # noqa: B023


@pytest.mark.parametrize("name", FURTHER)
def test_wrappers_of_further_models_equal_them(name: str) -> None:
    model = small(name)
    for comparison in verify(graph_model(model), model, eager(graph_model(model)), [(64, 96)]):
        assert comparison.problems() == []


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in .onnx, or in .pt2"):
        export_model(nn.Linear(1, 1), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="A Conv2d cannot be exported. These can: FCOS"):
        export_model(nn.Conv2d(3, 3, 1), tmp_path / "x.pt2")
    net = create_backbone("focalnet_nano", embed_dim=8, valid_context=True)
    with pytest.raises(ValueError, match="valid_context cannot be exported"):
        export_model(net, tmp_path / "x.pt2")
    config = CONFIGS / "ADE20K-SemanticSegmentation/upernet_focalnet_nano_small.py"
    windows = [*PLAIN, "model.channels=16", "model.window=[64,64]", "model.window_stride=[32,32]"]
    model = read_experiment(load_config(config, windows)).model()
    with pytest.raises(ValueError, match="sliding windows cannot be exported"):
        export_model(model, tmp_path / "x.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_too_large_for_onnx_is_refused(tmp_path: Path) -> None:
    needs_onnx()
    with torch.device("meta"):
        net = create_backbone("focalnet_huge_fl3")
    with pytest.raises(ValueError, match=r"2.7 GB, and an ONNX file holds at most 2 GB"):
        export_model(net, tmp_path / "x.onnx")


def table() -> str:
    """Return the table of docs/export.md: what the wrappers give, and who runs their files."""
    rows = ["| model | `.onnx`, `.pt2` | results | files are compared in |", "|---|---|---|---|"]
    net = create_backbone("focalnet_nano")
    rows.append(_row("Backbones", graph_model(net).outputs, "make test"))
    for name, (config, overrides) in (MODELS | FURTHER).items():
        if name == REFUSED:
            rows.append(f"| {name} | no | {REASON} | |")
            continue
        model = read_experiment(load_config(CONFIGS / config, overrides)).skeleton()[0]
        rows.append(
            _row(name, graph_model(model).outputs, "make test" if name in ALWAYS else "make soak")
        )
    config = "COCO-Keypoints/keypoint_rcnn_focalnet_tiny_srf_fpn_1x.py"
    model = read_experiment(load_config(CONFIGS / config, [])).skeleton()[0]
    with pytest.raises(ValueError, match="Keypoint R-CNN cannot be exported") as refusal:
        graph_model(model)
    reason = str(refusal.value).split(": ")[1]
    rows.append(f"| Keypoint R-CNN | no | {reason} | |")
    return "\n".join(rows) + "\n"


def _row(name: str, outputs: Any, where: str) -> str:
    return f"| {name} | yes | {', '.join(f'`{output}`' for output in outputs)} | `{where}` |"


def test_the_table_of_the_page() -> None:
    begin, end = "<!-- begin: tests/predict/export/test_export_model.py -->", "<!-- end -->"
    shown = (ROOT / "docs/export.md").read_text().split(begin)[1].split(end)[0]
    assert shown.strip() == table().strip()
