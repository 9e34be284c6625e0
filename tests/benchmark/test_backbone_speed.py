"""The benchmark's arithmetic, and the tool on images that take no time."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from focalnet_det.benchmark import (
    backbone_speed as speed,
)
from focalnet_det.benchmark import (
    contenders as peers,
)
from focalnet_det.benchmark import (
    detector_speed,
    gpu_suite,
)
from focalnet_det.ops.focal_block import policy
from tests.helpers.paths import ROOT, TOOLS
from tests.helpers.processes import run_program


def linear(scale: float = 1.0) -> peers.Contender:
    torch.manual_seed(0)
    module = nn.Conv2d(3, 2, 1, bias=False)
    module.weight.data.mul_(scale)
    return peers.Contender("conv", module, lambda x: [module(x)], equal=True)


def test_ratio_is_taken_repeat_by_repeat() -> None:
    ours = speed.Timing("a", (1.0, 2.0, 4.0), None, None, None)
    other = speed.Timing("b", (3.0, 2.0, 20.0), None, None, None)
    assert ours.median == 2.0
    assert ours.ratio(other) == (3.0, 1.0, 5.0)


def test_networks_that_differ_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"conv differ by 1\.0e-02"):
        speed.compare([linear(), linear(1.01)], torch.ones(1, 3, 4, 5), training=False, repeats=1)


def test_time_by_another_clock() -> None:
    ticks = iter(range(100))
    timings = speed.compare(
        [linear(), linear()], torch.ones(1, 3, 4, 5), training=False, repeats=2,
        clock=lambda: float(next(ticks) ** 2),
    )  # fmt: skip
    assert [timing.seconds for timing in timings] == [(1.0, 9.0), (5.0, 13.0)]


# a and b run; between two bars, on the clock.
@pytest.mark.parametrize(
    ("seconds", "expected"), [(1.0, "a|a|b|b|a|a|b|b|"), (20.0, "a|a|b|b||a||b|")]
)
def test_a_timed_run_follows_one_of_the_same_network(seconds: float, expected: str) -> None:
    runs: list[str] = []

    def contender(name: str) -> peers.Contender:
        def features(x: torch.Tensor) -> list[torch.Tensor]:
            runs.append(name)
            return [x]

        return peers.Contender(name, torch.nn.Identity(), features)

    def clock() -> float:
        runs.append("|")
        return runs.count("|") * seconds

    contenders = [contender("a"), contender("b")]
    speed.compare(contenders, torch.ones(1, 3, 4, 5), training=False, repeats=2, clock=clock)
    # Before that, outputs are compared, off the clock.
    assert "".join(runs).endswith(expected)
    assert runs.count("|") == expected.count("|")


def test_kept_bytes_are_those_of_the_input_of_a_convolution() -> None:
    images = torch.ones(2, 3, 4, 5)
    (timing,) = speed.compare([linear()], images, training=True, repeats=2)
    # The input, and the output for its square: 3 and 2 channels; the latter is not the network's.
    assert timing.saved_bytes == 2 * 3 * 4 * 5 * 4
    assert len(timing.seconds) == 2
    assert timing.difference == 0.0


def test_the_path_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "torch"):
        if before is None:
            monkeypatch.delenv(policy.VARIABLE, raising=False)
        else:
            monkeypatch.setenv(policy.VARIABLE, before)
        with policy.force_backend("reference"):
            assert os.environ[policy.VARIABLE] == "reference"
        assert os.environ.get(policy.VARIABLE) == before


@torch.no_grad()
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_peers_have_our_weights(library: str) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed")
    net = peers.focalnet(2, 3).eval()
    module, features = getattr(peers, f"{library}_focalnet")(net, 2, 3)
    module.eval()
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(features(x)[-1], net(x)["stage4"], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_swin_of_torchvision_gives_its_four_maps() -> None:
    module, features = peers.torchvision_swin()
    module.eval()
    images = torch.randn(1, 3, 64, 96)
    maps = features(images)
    shapes = [tuple(f.shape) for f in maps]
    assert shapes == [(1, 16 // 2**i, 24 // 2**i, 96 * 2**i) for i in range(4)]
    torch.testing.assert_close(maps[-1], module(images))
    # A merging of patches reads each map but the last; the parts after it make the next.
    for number, x in enumerate(maps[:-1]):
        torch.testing.assert_close(module[2 * number + 2 : 2 * number + 4](x), maps[number + 1])


def test_roofline_counts_the_least_traffic() -> None:
    net, images = peers.focalnet(2, 3), torch.zeros(1, 3, 64, 64)
    stages = speed.roofline(net, images, speed.Ceilings(macs=1e12, bytes=1.0), repeats=1)
    assert [stage.name for stage in stages] == ["stage1", "stage2", "stage3", "stage4"]
    weights = sum(p.numel() for p in net.layers[0].blocks.parameters())
    # Two blocks read and write 16 x 16 x 96 values.
    assert stages[0].least_bytes == 4 * (4 * 16 * 16 * 96 + weights)
    assert stages[0].floor == stages[0].least_bytes


def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_program(TOOLS / "benchmark.py", "--threads", "1", *arguments)


@pytest.mark.slow
def test_tool_writes_table_json_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="timm is a test dependency")
    report, picture = tmp_path / "out.json", tmp_path / "out.png"
    result = tool(
        "--training", "--size", "32", "64", "--repeats", "2", "--only", "timm", "--roofline",
        "--json", str(report), "--plot", str(picture),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "training step, 1 x 32 x 64, float32" in result.stdout
    content = json.loads(report.read_text())
    assert [timing["name"] for timing in content["timings"]] == ["ours", "timm"]
    assert all(len(timing["seconds"]) == 2 for timing in content["timings"])
    assert content["timings"][1]["difference"] < 1e-4
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_tool_compares_a_variant_with_the_published_computation_and_swin(tmp_path: Path) -> None:
    report = tmp_path / "out.json"
    result = tool(
        "--variant", "focal_nano", "--size", "32", "64", "--repeats", "1", "--peers", "torchvision",
        "--only", "ours, reference", "torchvision", "--json", str(report),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "float32, focal_nano" in result.stdout
    timings = json.loads(report.read_text())["timings"]
    assert [timing["name"] for timing in timings] == ["ours", "ours, reference", "torchvision"]
    assert timings[1]["difference"] < 1e-4
    assert timings[2]["difference"] is None


def test_a_variant_is_not_compared_with_copies_of_focalnet() -> None:
    result = tool("--variant", "focal_nano", "--peers", "timm")
    assert (result.returncode, result.stdout) == (1, "")
    assert "Remove --variant" in result.stderr


def test_tool_reports_bad_input_in_one_line() -> None:
    result = tool("--kernels", "3", "7", "--peers")
    assert result.returncode == 1
    assert (
        result.stderr
        == "error: --kernels must increase by 2 from level to level, such as 9 11 13.\n"
    )


NANO = ROOT / "configs/COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py"


def test_whole_detectors() -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
    from focalnet_det.benchmark.recipe_models import detector

    cpu = torch.device("cpu")
    ours, other = detector(NANO, cpu), detector(NANO, cpu, path="reference")
    assert (ours.name, other.name) == (NANO.stem, f"{NANO.stem}, reference")
    weights = other.module.state_dict()
    assert all(torch.equal(w, weights[name]) for name, w in ours.module.state_dict().items())
    images = torch.randn(2, 3, 64, 96)
    # 100 boxes an image, sure of nothing or not.
    assert [scores.shape for scores in ours.module.eval() and ours.features(images)] == [(100,)] * 2
    ours.module.train()
    assert all(0 < loss < 100 for loss in ours.features(images))
    timings = speed.compare([ours, other], images, training=True, repeats=1)
    assert all(timing.saved_bytes > 0 for timing in timings)


def test_mask2former_beside_that_of_transformers() -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
    pytest.importorskip("transformers")
    from focalnet_det.benchmark.recipe_models import detector, transformers_mask2former

    config = ROOT / "configs/Shapes-SemanticSegmentation/mask2former_focalnet_nano_small.py"
    cpu = torch.device("cpu")
    ours, theirs = detector(config, cpu), transformers_mask2former(10, cpu)
    # Theirs has the published size: Swin-T and a norm for each stage, and the head for 150 classes
    # less the classes that are fewer.
    backbone, head = 27_519_354 + 2 * (96 + 192 + 384 + 768), 19_918_935 - 140 * 257
    assert sum(p.numel() for p in theirs.module.parameters()) == backbone + head
    with torch.no_grad():
        for contender, queries in ((ours, 20), (theirs, 100)):
            contender.module.eval()
            classes, masks = (x.shape for x in contender.features(torch.randn(1, 3, 64, 96)))
            assert (classes, masks) == ((1, queries, 11), (1, queries, 16, 24))
    ours.module.train()
    with pytest.raises(ValueError, match="Remove --training"):
        ours.features(torch.randn(1, 3, 64, 96))


def test_a_backbone_is_no_whole_detector() -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
    from focalnet_det.benchmark.recipe_models import detector

    config = ROOT / "configs/Shapes-SemanticSegmentation/upernet_focalnet_nano_small.py"
    with pytest.raises(ValueError, match="not a detector"):
        detector(config, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"not a \.py config"):
        detector(NANO.with_suffix(".yaml"), torch.device("cpu"))


def timing(name: str, milliseconds: float, peak: int, difference: float | None = 0.0) -> dict:
    return {
        "name": name,
        "median": milliseconds / 1e3,
        "peak_bytes": peak,
        "difference": difference,
    }


def test_the_gpu_suite_compares_with_the_best_equal_peer_of_each_kind() -> None:
    timings = [
        timing("ours", 10, 300),
        timing("ours, lean", 1, 100),
        timing("ours, reference", 50, 1000),
        timing("ours, CUDA graphs", 8, 0),
        timing("timm", 40, 0),
        timing("timm, compiled", 20, 0),
        timing("transformers, CUDA graphs", 16, 0),
        timing("swin", 2, 0, None),
    ]
    row = gpu_suite.ratios(gpu_suite.CASES[0], timings)
    assert (row["eager"], row["eager pair"]) == (4.0, "ours / timm")
    pair = "ours, CUDA graphs / transformers, CUDA graphs"
    assert (row["compiled"], row["compiled pair"]) == (2.0, pair)
    assert row["memory"] == 0.3
    assert row["ms"] == 10.0
    assert gpu_suite.ratios(gpu_suite.CASES[0], timings[:5])["compiled"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_suite_says_that_it_needs_a_gpu() -> None:
    done = run_program(TOOLS / "benchmark.py", "--suite", "gpu")
    assert done.returncode
    assert done.stderr.strip().endswith(
        "--suite gpu requires a CUDA device, but PyTorch finds none."
    )


def test_the_gpu_suite_goes_on_after_a_failure_and_where_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = {"timings": [timing("ours", 10, 300), timing("ours, reference", 50, 1000)]}
    tool = tmp_path / "tool.py"
    tool.write_text(
        "import pathlib, sys\n"
        "if '--batch-size 16' in ' '.join(sys.argv): sys.exit(3)\n"
        f"pathlib.Path(sys.argv[-1]).write_text({json.dumps(report)!r})\n"
    )
    monkeypatch.setattr(gpu_suite, "DETECTORS", ())
    failed = sum("--batch-size 16" in case.arguments for case in gpu_suite.CASES)
    with pytest.raises(ChildProcessError, match=f"{failed} benchmarks failed"):
        gpu_suite.run(tool, tmp_path / "out")
    cases = json.loads((tmp_path / "out/suite.json").read_text())["cases"]
    assert [case["eager"] for case in cases] == [5.0] * (len(gpu_suite.CASES) - failed)
    assert "failed with exit code 3" in capfd.readouterr().err

    tool.write_text(
        f"import pathlib, sys\npathlib.Path(sys.argv[-1]).write_text({json.dumps(report)!r})"
    )
    gpu_suite.run(tool, tmp_path / "out")
    printed = capfd.readouterr().out
    assert printed.count("delete it to measure again") == len(gpu_suite.CASES) - failed
    assert len(json.loads((tmp_path / "out/suite.json").read_text())["cases"]) == len(
        gpu_suite.CASES
    )


def test_kernels_are_counted_once() -> None:
    """Kernels have times of their own, those of operators and spans of labels repeat them."""

    def event(key: str, place: str, **numbers: object) -> SimpleNamespace:
        zero = {
            "self_device_time_total": 0,
            "device_time_total": 0,
            "cpu_time_total": 0,
            "count": 1,
        }
        more = {"is_user_annotation": False} | zero | numbers
        return SimpleNamespace(key=key, device_type=SimpleNamespace(name=place), **more)

    steps = detector_speed.PROFILED
    events = [
        event("kernel", "CUDA", self_device_time_total=100.0 * steps),
        event("aten::mm", "CPU", self_device_time_total=100.0 * steps, cpu_time_total=7.0),
        event("backbone", "CPU", device_time_total=100.0 * steps, cpu_time_total=900.0 * steps),
        event("backbone", "CUDA", self_device_time_total=300.0 * steps, is_user_annotation=True,
              device_time_total=300.0 * steps),
        event("aten::nonzero", "CPU", count=3 * steps),
    ]  # fmt: skip
    found = detector_speed.summary(events, wall=400e-6 * steps, on_gpu=True)
    assert found == {
        "busy_share": pytest.approx(0.25), "parts": {"backbone": pytest.approx(100e-6)}, "waits": 3,
    }  # fmt: skip
    found = detector_speed.summary(events, wall=1.0, on_gpu=False)
    assert (found["busy_share"], found["parts"]) == (None, {"backbone": pytest.approx(900e-6)})


@pytest.mark.slow
def test_training_speed_of_a_detector(tmp_path: Path) -> None:
    config = ROOT / "configs/Shapes-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_demo.py"
    program = tmp_path / "program.py"
    program.write_text("from focalnet_det.benchmark import detector_speed\ndetector_speed.main()\n")
    done = run_program(
        program, "--config", config, "--data", tmp_path / "data", "--size", "96", "128",
        "--device", "cpu", "--precision", "fp32", "--batch-size", "2", "--workers", "1",
        "--warm-up", "1", "--steps", "2", "--json", tmp_path / "timing.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    timing = json.loads((tmp_path / "timing.json").read_text())
    assert timing == json.loads(done.stdout.splitlines()[-1])
    assert timing["images_per_second"] > 0
    assert 0 <= timing["data_share"] <= 1
    # A part includes those inside it, and a step all of them.
    parts = timing["parts"]
    assert parts.keys() == {*detector_speed.PARTS, "optimizer"}
    assert 0 < parts["backbone.bottom_up"] < parts["backbone"]
    assert timing["waits"] >= 1


def test_recipes_of_the_gpu_suite_are_there() -> None:
    assert all((gpu_suite.RECIPES / recipe).is_file() for recipe, _ in gpu_suite.DETECTORS)
