"""Networks with new focal levels: from a config, while they grow, interrupted and resumed."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.config import get_cfg, instantiate

from focalnet_det import add_focalnet_config, create_backbone
from focalnet_det.checkpoint import load_initial_weights
from focalnet_det.checkpoint.global_level import global_levels, set_global_levels
from focalnet_det.engine.main import RunArguments, run
from focalnet_det.engine.numerics import NumericalTrouble
from focalnet_det.engine.replay import replay_file
from focalnet_det.engine.trainer import Trainer
from focalnet_det.experiment import TrainOptions, load_config
from focalnet_det.experiment.yacs import read_options
from tests.helpers.paths import ROOT

NANO = str(ROOT / "configs/COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py")
LEVELS = "model.backbone.bottom_up.focal_levels=[3,3,3,3]"
SMALL = [
    "dataloader.train.batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.train.augmentations.short_sides=[64]",
    "dataloader.train.augmentations.crop=64",
    "schedule.warmup_iterations=0",
    "schedule.iterations=6",
    "train.period_unit=iterations",
    "train.checkpoint_period=2",
    "train.seed=1",
    "train.device=cpu",
    "train.pictures=0",
]
BLOCKS = 6


@pytest.fixture(scope="module")
def two_levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier's file of focalnet_nano, which has two levels."""
    path = tmp_path_factory.mktemp("weights") / "nano.pth"
    torch.save({"model": create_backbone("focalnet_nano").state_dict()}, path)
    return path


def weights(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.slow
def test_a_growing_run_becomes_ordinary_and_resumes_bit_for_bit(
    two_levels: Path, shapes: Path, tmp_path: Path
) -> None:
    def go(output: Path, resume: bool = False) -> None:
        run(
            RunArguments(
                config_file=NANO,
                opts=[
                    *(*SMALL, LEVELS, f"train.init_checkpoint={two_levels}"),
                    *("train.init_levels=preserving", "train.growth_iterations=4"),
                    "train.ema_decay=0.5",
                ],
                output=str(output),
                coco_json=[str(shapes / "annotations/instances_train.json")],
                images=[str(shapes / "images/train")],
                resume=resume,
            )
        )

    whole, torn = tmp_path / "whole", tmp_path / "torn"
    go(whole)
    log = (whole / "log.txt").read_text()
    assert "transition to the new focal levels until iteration 4." in log
    assert "The transition to the new focal levels is complete" in log
    # After two of four iterations the global contexts are half way from level 2 to level 3.
    saved = torch.load(whole / "model_0000001.pth", weights_only=True)
    for state in (saved["model"], saved["trainer"]["ema"]):
        found = [t.item() for n, t in state.items() if n.endswith("global_level")]
        assert found == [2.5] * BLOCKS
    final = weights(whole / "model_final.pth")
    assert not any("global_level" in name for name in final)
    assert not any("global_level" in name for name in weights(whole / "model_ema.pth"))
    # The new gates have learned.
    name = "backbone.bottom_up.layers.0.blocks.0.modulation.f.weight"
    dim = final[name].shape[1]
    assert final[name][2 * dim + 2].abs().max() > 0

    torn.mkdir()
    shutil.copy(whole / "model_0000001.pth", torn)
    (torn / "last_checkpoint").write_text("model_0000001.pth")
    go(torn, resume=True)
    assert "Resuming from iteration 2." in (torn / "log.txt").read_text()
    resumed = weights(torn / "model_final.pth")
    assert resumed.keys() == final.keys()
    assert all(torch.equal(resumed[n], t) for n, t in final.items())
    averaged = weights(torn / "model_ema.pth")
    assert all(torch.equal(averaged[n], t) for n, t in weights(whole / "model_ema.pth").items())


def nano(*opts: str) -> nn.Module:
    return instantiate(load_config(NANO, ["model.roi_heads.num_classes=3", *opts]).model).eval()


def test_whole_detectors_grow(tmp_path: Path) -> None:
    old, new = nano(), nano(LEVELS)
    path = tmp_path / "detector.pth"
    torch.save({"model": old.state_dict()}, path)
    with pytest.raises(ValueError, match=r'levels="preserving" adds levels'):
        load_initial_weights(new, path)
    report = load_initial_weights(new, path, levels="preserving")
    assert report.missing == []
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before, after = old.backbone(x), new.backbone(x)
    for name, feature in before.items():
        torch.testing.assert_close(after[name], feature, rtol=1e-5, atol=1e-5)
    report = load_initial_weights(nano(LEVELS), path, levels="official")
    kernels = [n for n in report.missing if n.endswith("focal_layers.2.0.weight")]
    assert len(kernels) == len(report.missing) == BLOCKS


def test_backbones_of_files_grow(two_levels: Path) -> None:
    model = nano(LEVELS)
    load_initial_weights(model, two_levels, levels="preserving")
    assert global_levels(model) == {
        f"backbone.bottom_up.layers.{i}.blocks.{j}.modulation": 2.0
        for i, depth in enumerate((1, 1, 3, 1))
        for j in range(depth)
    }


def test_growth_is_set_by_name() -> None:
    net = create_backbone("focalnet_nano", focal_levels=(3, 3, 3, 3))
    name = "layers.2.blocks.1.modulation"
    set_global_levels(net, {name: 2.25})
    assert global_levels(net) == {name: 2.25}
    set_global_levels(net, {})
    assert global_levels(net) == {}
    with pytest.raises(ValueError, match="layers.9 has a global level in the checkpoint"):
        set_global_levels(net, {"layers.9": 1.0})


def test_options() -> None:
    with pytest.raises(ValueError, match="init_levels 'more'. Known: official, by_kernel"):
        TrainOptions(init_levels="more")
    with pytest.raises(ValueError, match="growth_iterations must be 1 or more, got 0"):
        TrainOptions(growth_iterations=0)
    cfg = get_cfg()
    add_focalnet_config(cfg)
    cfg.SOLVER.INIT_LEVELS, cfg.SOLVER.GROWTH_ITERATIONS = "shrink", 7
    options = read_options(cfg)
    assert (options.init_levels, options.growth_iterations) == ("shrink", 7)


@pytest.mark.slow
def test_trouble_of_a_growing_network_is_replayed(
    two_levels: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights hold how far it has grown; a new network of the config does not."""
    healthy: dict[str, Tensor] = {}
    compute = Trainer.accumulate_gradients

    def spoil(trainer: Trainer, data: list[dict]) -> dict[str, Tensor]:
        healthy.update(compute(trainer, data))
        return {name: loss * torch.nan for name, loss in healthy.items()}

    monkeypatch.setattr(Trainer, "accumulate_gradients", spoil)
    opts = [*SMALL, LEVELS, f"train.init_checkpoint={two_levels}", "train.init_levels=preserving"]
    args = RunArguments(
        config_file=NANO,
        opts=[*opts, "train.growth_iterations=4"],
        output=str(tmp_path),
        coco_json=[str(shapes / "annotations/instances_train.json")],
        images=[str(shapes / "images/train")],
    )
    with pytest.raises(NumericalTrouble, match="Iteration 1"):
        run(args)
    (replayed,) = replay_file(tmp_path / "trouble_0000000.pth")
    expected = {name: float(loss) for name, loss in healthy.items()}
    assert replayed.losses == pytest.approx(expected, rel=1e-5)
