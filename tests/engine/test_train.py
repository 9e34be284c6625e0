"""tools/train_net.py's route from arguments to files, on generated and on real images."""

import errno
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.config import LazyConfig, instantiate
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn

from focalnet_det.engine.checkpoints import Checkpoints, RunFacts
from focalnet_det.engine.hooks import ProgressLine
from focalnet_det.engine.launch import launch_run
from focalnet_det.engine.main import RunArguments, run
from focalnet_det.experiment import load_config, read_experiment
from tests.helpers.paths import CONFIGS

NANO = CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py"
TINY_YAML = CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_focalnet_tiny_srf_fpn_1x.yaml"
SMALL = [
    "dataloader.train.batch_size=2",
    "dataloader.train.num_workers=0",
    "dataloader.train.augmentations.short_sides=[96]",
    "dataloader.train.augmentations.crop=96",
    "dataloader.test.0.num_workers=0",
    "dataloader.test.0.augmentations.short_side=96",
    "schedule.warmup_iterations=0",
    "train.period_unit=iterations",
    "train.eval_period=0",
    "train.log_iterations=1",
    "train.seed=1",
    "train.device=cpu",
]


def arguments(shapes: Path, output: Path, *opts: str, **changes: object) -> RunArguments:
    fields = {
        "config_file": str(NANO),
        "opts": [*SMALL, *opts],
        "output": str(output),
        "coco_json": [str(shapes / "annotations/instances_train.json")],
        "images": [str(shapes / "images/train")],
        "val_json": [str(shapes / "annotations/instances_val.json")],
        "val_images": [str(shapes / "images/val")],
    }
    return RunArguments(**(fields | changes))


def checkpoint(folder: Path, name: str = "model_final.pth") -> dict:
    return torch.load(folder / name, weights_only=True)


def test_run_leaves_its_record_and_evaluation_repeats(shapes: Path, tmp_path: Path) -> None:
    trained = run(arguments(shapes, tmp_path / "a", "schedule.iterations=3"))
    metrics = trained["instances_val"]
    assert {"bbox", "segm"} <= set(metrics)
    assert {"AP", "AP50", "AP-star"} <= set(metrics["segm"])

    lines = [json.loads(line) for line in (tmp_path / "a/metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert all(math.isfinite(line["total_loss"]) and line["lr"] >= 0 for line in lines)
    assert lines[2]["instances_val/segm/AP"] == pytest.approx(metrics["segm"]["AP"])
    assert list((tmp_path / "a").glob("events.out.tfevents.*"))
    assert "shapes" not in (tmp_path / "a/environment.txt").read_text()[:20]
    on_disk = json.loads((tmp_path / "a/evaluation/instances_val/coco_metrics.json").read_text())
    assert on_disk["segm"]["AP"] == pytest.approx(metrics["segm"]["AP"])

    with Image.open(tmp_path / "a/train_samples.png") as picture:
        assert picture.width == 1440
    # Four validation images of 96 px, three panels each.
    with Image.open(tmp_path / "a/predictions.png") as picture:
        assert picture.height > picture.width > 500

    weights = f"train.init_checkpoint={tmp_path / 'a/model_final.pth'}"
    again = run(arguments(shapes, tmp_path / "b", weights, "train.pictures=2", eval_only=True))
    assert not (tmp_path / "b/train_samples.png").exists()
    with Image.open(tmp_path / "b/predictions.png") as picture:
        assert picture.height < picture.width
    for task, values in metrics.items():
        assert again["instances_val"][task] == pytest.approx(values, nan_ok=True)

    # Views of test-time augmentation are drawn too.
    views = ("train.pictures=1", "dataloader.test.0.flip=True")
    run(arguments(shapes, tmp_path / "c", weights, *views, eval_only=True))
    assert (tmp_path / "c/predictions.png").exists()

    # The saved config alone rebuilds the model that the weights fit.
    saved = LazyConfig.load(str(tmp_path / "a/config.yaml"))
    instantiate(saved.model).load_state_dict(checkpoint(tmp_path / "a")["model"])


def test_resume_continues_iteration_optimizer_and_schedule(shapes: Path, tmp_path: Path) -> None:
    opts = ("schedule.iterations=4", "train.checkpoint_period=2")
    run(arguments(shapes, tmp_path, *opts))
    first = checkpoint(tmp_path, "model_0000001.pth")
    assert first["iteration"] == 1
    # A kill after iteration 2: only its checkpoint is there.
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    (tmp_path / "model_final.pth").unlink()
    run(arguments(shapes, tmp_path, *opts, resume=True))
    last = checkpoint(tmp_path)
    assert last["iteration"] == 3
    steps = {state["step"].item() for state in last["trainer"]["optimizer"]["state"].values()}
    assert steps == {4.0}
    # Cosine without warmup: after the last of 4 updates the factor is (1 + cos(pi)) / 2.
    assert last["trainer"]["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0, abs=1e-9)
    iterations = [json.loads(line)["iteration"] for line in (tmp_path / "metrics.json").open()]
    assert iterations == [0, 1, 2, 3]


def test_yaml_config_trains_own_data(shapes: Path, tmp_path: Path) -> None:
    opts = [
        "MODEL.FOCALNET.VARIANT", "focalnet_nano", "MODEL.FPN.OUT_CHANNELS", "16",
        "MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16",
        "SOLVER.IMS_PER_BATCH", "2", "SOLVER.EPOCHS", "0", "SOLVER.MAX_ITER", "2",
        "SOLVER.PRECISION", "fp32", "SOLVER.WARMUP_ITERS", "0", "DATALOADER.NUM_WORKERS", "0",
        "INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96", "MODEL.DEVICE", "cpu",
    ]  # fmt: skip
    results = run(arguments(shapes, tmp_path, config_file=str(TINY_YAML), opts=opts))
    assert "segm" in results["instances_val"]
    weights = checkpoint(tmp_path)["model"]
    # Six classes and the background, read from the file.
    assert weights["roi_heads.box_predictor.cls_score.weight"].shape == (7, 32)


def test_bf16_on_cpu_and_clipping(shapes: Path, tmp_path: Path) -> None:
    opts = ("schedule.iterations=1", "train.precision=bf16", "train.clip_norm=0.1")
    run(arguments(shapes, tmp_path, *opts, val_json=[], val_images=[]))
    assert not (tmp_path / "predictions.png").exists()
    assert all(torch.isfinite(v).all() for v in checkpoint(tmp_path)["model"].values())


@pytest.mark.slow
def test_learns_eight_images(shapes: Path, tmp_path: Path) -> None:
    """The whole chain can overfit: evaluated on its own training images."""
    train = {"val_json": [str(shapes / "annotations/instances_train.json")]}
    train["val_images"] = [str(shapes / "images/train")]
    opts = ("schedule.iterations=250", "dataloader.train.batch_size=4", "train.log_iterations=50")
    results = run(arguments(shapes, tmp_path, *opts, **train))
    metrics = results["instances_train_val"]
    assert metrics["bbox"]["AP50"] > 60
    assert metrics["segm"]["AP50"] > 60


@pytest.mark.slow
def test_evaluates_real_coco_images(shared_data: Path, tmp_path: Path) -> None:
    """Eighty classes, crowds, an image without annotations, non-contiguous ids."""
    root = shared_data / "coco_tiny"
    args = RunArguments(
        config_file=str(NANO),
        opts=[*SMALL, "schedule.iterations=1"],
        output=str(tmp_path),
        coco_json=[str(root / "annotations/instances_train2017.json")],
        images=[str(root / "images/train2017")],
        val_json=[str(root / "annotations/instances_val2017.json")],
        val_images=[str(root / "images/val2017")],
    )
    metrics = run(args)["instances_val2017"]
    assert sum(name.startswith("AP-") for name in metrics["bbox"]) == 80


class Progress:
    """A state with nothing in it."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def test_full_disk_leaves_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, nn.Linear(2, 2), Progress(), RunFacts("a", "", ""), keep=2)
    checkpoints.save(3)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"model_0000005\.pth.*No space left.*--resume"):
        checkpoints.save(5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000003.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"


def test_progress_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 105.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    line = ProgressLine(max_iter=100, batch_size=8)
    with EventStorage(9) as storage, caplog.at_level("INFO"):
        storage.put_scalars(total_loss=3.0, loss_cls=1.0, loss_mask=2.0, lr=1e-4, data_time=0.5)
        line.write()
        storage.iter = 19
        storage.put_scalars(total_loss=3.0, loss_cls=1.0, loss_mask=2.0, lr=1e-4, data_time=0.5)
        line.write()
    # 10 iterations in 5 s: 16 images a second, 80 iterations in 40 s.
    assert "20/100  eta 0:00:40" in caplog.text
    assert (
        "loss 3.000 (cls 1.000, mask 2.000)  lr 1.00e-04  16.0 img/s  data 0.500 s" in caplog.text
    )


def test_more_gpus_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="--num-gpus 64"):
        launch_run(RunArguments(config_file=str(NANO), num_gpus=64))


def test_eval_only_without_weights_is_an_error(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.init_checkpoint"):
        run(arguments(shapes, tmp_path, eval_only=True))


def test_absent_data_set_says_where_it_should_be(tmp_path: Path) -> None:
    absent = "dataloader.train.datasets=shapes_absent"
    register_coco_instances("shapes_absent", {}, str(tmp_path / "a.json"), str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"a\.json.*DETECTRON2_DATASETS"):
        run(RunArguments(config_file=str(NANO), opts=[absent], output=str(tmp_path / "run")))


def test_experiment_of_every_kind_has_the_same_parts() -> None:
    for path in (NANO, TINY_YAML):
        experiment = read_experiment(load_config(path, []))
        assert callable(experiment.model)
        assert experiment.config_text
