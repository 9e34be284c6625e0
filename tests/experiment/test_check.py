"""Bad configs and command lines: one clear line each, before the first step."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
from focalnet_det.experiment import RunArguments, check, describe
from focalnet_det.experiment.check import disk_problems, skeleton, weight_problems
from tests.helpers.paths import TOOLS
from tests.helpers.processes import run_program
from tests.helpers.refused import (
    BOXES,
    CONFIGS,
    NANO,
    ONE_X,
    PANOPTIC,
    RETINANET_YAML,
    UPERNET,
    UPERNET_YAML,
    YAML,
    data_of,
    error,
    error_of,
)

PAIRS = [
    (YAML, ["SOLVER.AMP.ENABLED=True", "SOLVER.PRECISION=bf16"], "AMP.ENABLED means fp16"),
    (YAML, ["SOLVER.MAX_ITER=90", "SOLVER.EPOCH_STEPS=(1,)"], "SOLVER.EPOCH_STEPS has no effect"),
    (YAML, ["SOLVER.MAX_ITER=90", "SOLVER.STEPS=(60,200)"], "200 iterations is not within"),
    (YAML, ["SOLVER.MAX_ITER=90", "SOLVER.STEPS=(60,30)"], "must be in ascending order"),
    (YAML, ["SOLVER.MAX_ITER=60", "SOLVER.WARMUP_ITERS=100"], "WARMUP_ITERS of 100 is not shorter"),
    (ONE_X, ["schedule.iterations=60", "schedule.warmup_iterations=60"], "of 60 is not shorter"),
    (ONE_X, ["schedule.iterations=60", "schedule.epochs=2"], "either epochs or iterations"),
    (ONE_X, ["schedule.epochs=3", "schedule.milestones=[9,11]"], "9 epochs is not within"),
    (ONE_X, ["schedule.iterations=60", "train.eval_period=99"], "longer than the training of 60"),
    (BOXES, ["train.keep_best=segm/AP"], "Known: bbox/AP, ..."),
    (BOXES, ["dataloader.train.copy_paste=0.5"], "copy_paste requires masks"),
    (UPERNET, ["train.keep_best=segm/AP"], "Known: sem_seg/mIoU, ..."),
    (UPERNET, ["model.loss.class_weights=[1,2]"], "2 class weights for 3 classes"),
    (UPERNET, ["model.loss.class_weights=[0,0,0]"], "All class weights are 0"),
    (UPERNET, ["model.loss.class_weights=[1,-1,1]"], "class_weights must be 0 or more"),
    (UPERNET, ["model.loss.average=some"], "Unknown average 'some'"),
    (UPERNET, ["model.window=[64,64]", "model.window_stride=[99,9]"], "window_stride"),
    (UPERNET, ["+optimizer.lr_factors.bottom_up=0.1"], "no parameter has 'bottom_up'"),
    (UPERNET_YAML, ["MODEL.UPERNET.CLASS_WEIGHTS=[1,2]"], "2 class weights"),
    (UPERNET_YAML, ["MODEL.RPN.NMS_THRESH=0.5"], "MODEL.RPN.NMS_THRESH has no effect"),
    (RETINANET_YAML, ["MODEL.ROI_HEADS.NMS_THRESH_TEST=0.3"], "NMS_THRESH_TEST has no effect"),
    (PANOPTIC, ["train.keep_best=panoptic_seg/AP"], "panoptic_seg/PQ, ..."),
    (NANO, ["optimizer.lr=-1", "train.clip_norm=-1"], "clip_norm must be 0 or more"),
    (NANO, ["optimizer.lr=-1", "optimizer.weight_decay=-1"], "2 problems: (1) optimizer.lr"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "opts", "message"), PAIRS, ids=[" ".join(o) for _, o, _ in PAIRS]
)
def test_overrides_that_contradict_each_other(
    config: str, opts: list[str], message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error(config, opts, files, capsys)


OPTIONS = [
    (NANO, {"coco_json": None}, "--images has no effect without --coco-json"),
    (NANO, {"coco_json": None, "images": None}, "--val-json without --coco-json"),
    (NANO, {"val_json": None}, "--val-images has no effect without --val-json"),
    (NANO, {"images": None}, "Each --coco-json FILE needs --images DIR"),
    (NANO, {"images": ["{files}/train", "{files}/val"]}, "1 files, 2 folders"),
    (NANO, {"images": ["{files}/absent"]}, "absent does not exist"),
    (NANO, {"coco_json": ["{files}/absent.json"]}, "absent.json does not exist"),
    (NANO, {"val_json": ["{files}/absent.json"]}, "absent.json does not exist"),
    (NANO, {"eval_only": True, "resume": True}, "--eval-only and --resume contradict"),
    (NANO, {"classes": "{files}/classes.txt"}, "--classes has no effect without --sem-images"),
    (NANO, {"first_label": 1}, "--first-label has no effect without --classes"),
    (NANO, {"panoptic_root": ["{files}"]}, "--panoptic-root has no effect"),
    (NANO, {"panoptic_json": ["{files}/panoptic_train.json"]}, "uses one kind of data"),
    (UPERNET, {"classes": None}, "need --classes FILE"),
    (UPERNET, {"sem_labels": None}, "1 image folders, 0 label folders"),
    (UPERNET, {"sem_images": None, "sem_labels": None}, "there is no training set"),
    (UPERNET, {"sem_images": ["{files}/absent"]}, "No such folder"),
    (UPERNET, {"classes": "{files}/absent.txt"}, "absent.txt does not exist"),
    (PANOPTIC, {"images": None}, "0 image folders"),
    (PANOPTIC, {"panoptic_root": ["{files}/absent"]}, "absent does not exist"),
    (NANO, {"output": "{files}/train.json"}, "is not a folder"),
]  # fmt: skip


def filled(value: Any, files: Path) -> Any:
    if isinstance(value, list):
        return [filled(item, files) for item in value]
    return value.replace("{files}", str(files)) if isinstance(value, str) else value


@pytest.mark.parametrize(("config", "changes", "message"), OPTIONS, ids=[m for *_, m in OPTIONS])
def test_options_that_lack_or_contradict_each_other(
    config: str,
    changes: dict[str, Any],
    message: str,
    files: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {key: filled(value, files) for key, value in changes.items()}
    assert message in error(config, [], files, capsys, **changes)


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        (UPERNET, NANO, "COCO files (--coco-json) need a detector"),
        (UPERNET_YAML, NANO, "COCO files (--coco-json) need a detector"),
        (PANOPTIC, NANO, "COCO files (--coco-json) need a detector"),
        (NANO, UPERNET, "Label folders (--sem-images) need a semantic segmentor"),
        (YAML, UPERNET, "Label folders (--sem-images) need a semantic segmentor"),
        (NANO, PANOPTIC, "Panoptic files (--panoptic-json) need a panoptic model"),
        (UPERNET, PANOPTIC, "Panoptic files (--panoptic-json) need a panoptic model"),
    ],
)
def test_data_of_another_kind(
    config: str, data: str, message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = RunArguments(config_file=str(CONFIGS / config), **data_of(data, files))
    assert message in error_of(args, capsys)


FILES = {
    "absent.py": (None, "No such config file"),
    "config.json": ("{}", "neither a .py (LazyConfig) nor a .yaml (yacs)"),
    "empty.py": ("", "does not define model, optimizer, schedule, dataloader, train"),
    "syntax.py": ("model = (", "cannot be read: SyntaxError"),
    "name.py": ("model = mask_rcnn()", "cannot be read: NameError: name 'mask_rcnn'"),
    "list.yaml": ("[1, 2]", "it must be a mapping of keys"),
    "text.yaml": ("a: b: c", "is not valid yaml"),
    "binary.yaml": ("\x00\x01", "is not valid yaml"),
    "typo.yaml": ("SOLVER: {BASE_LT: 1.0}", "SOLVER.BASE_LT"),
    "type.yaml": ("SOLVER: {BASE_LR: [1, 2]}", "BASE_LR"),
    "section.yaml": ("SOLVER: 3", "SOLVER"),
    "version.yaml": ("VERSION: 9", "VERSION"),
    "code.yaml": (
        "MODEL: !!python/object/apply:os.system ['exit 3']",
        "yaml tag that executes code",
    ),
    "module.yaml": ("A: !!python/name:os.system", "yaml tag that executes code"),
    "cycle.yaml": ("_BASE_: cycle.yaml", "is its own _BASE_: cycle.yaml -> cycle.yaml"),
    "base.yaml": ("_BASE_: nowhere.yaml", "there is no _BASE_ file"),
    "hook.yaml": ("_BASE_: code.yaml", "yaml tag that executes code"),
    "calls.yaml": (
        "model: {_target_: os.system, command: exit}\noptimizer: {}\nschedule: {}\n"
        "dataloader: {}\ntrain: {}",
        "calls os.system. A saved config may only call focalnet_det",
    ),
    "name.yaml": (
        "model: {_target_: torch.nn.Module, f: {_target_: detectron2.utils.registry.locate, "
        "name: os.system}}\noptimizer: {}\nschedule: {}\ndataloader: {}\ntrain: {}",
        "calls os.system. A saved config may only call focalnet_det",
    ),
    "part.yaml": ("model: {_target_: torch.nn.Linear}", "it lacks optimizer, schedule"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_config(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for other, (text, _) in FILES.items():
        if text is not None:
            (tmp_path / other).write_text(text)
    message = FILES[name][1]
    assert message in error_of(RunArguments(config_file=str(tmp_path / name)), capsys)


def test_bases_in_a_circle_are_named(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{one}.yaml").write_text(f"_BASE_: {other}.yaml")
    with pytest.raises(ValueError, match=r"a\.yaml -> b\.yaml -> c\.yaml -> a\.yaml"):
        describe(RunArguments(config_file=str(tmp_path / "a.yaml")))


@pytest.mark.parametrize(
    ("config", "opts", "message"),
    [
        (
            NANO,
            ["model.roi_heads.num_classes=2", "dataloader.train.datasets=shapes_train"],
            "coco_2017_val has 80 classes, the model 2: set num_classes to 80",
        ),
        (UPERNET, ["model.num_classes=20"], "ade20k_sem_seg_train has 150 classes, the model 20"),
        (PANOPTIC, ["model.roi_heads.num_classes=5"], "has 6 classes, the model 5"),
        (YAML, ["MODEL.ROI_HEADS.NUM_CLASSES=79"], "coco_2017_train has 80 classes, the model 79"),
    ],
)
def test_more_classes_than_the_model_has(
    config: str, opts: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = RunArguments(config_file=str(CONFIGS / config), opts=opts)
    assert message in error_of(args, capsys)


def test_disk_space_is_estimated(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = RunArguments(config_file=str(CONFIGS / ONE_X), output=str(files / "run"))
    experiment = describe(args)
    model, _ = skeleton(experiment)

    def free(_: object) -> Any:
        return type("usage", (), {"free": free.bytes})()

    monkeypatch.setattr("shutil.disk_usage", free)
    # 48.7 M parameters, three numbers of 4 bytes each, in 5 files: 2.92 GB.
    free.bytes = 2_930_000_000
    assert disk_problems(experiment, model) == []
    free.bytes = 2_900_000_000
    (problem,) = disk_problems(experiment, model)
    assert "need about 2.7 GiB" in problem
    assert "keep_checkpoints" in problem


@pytest.mark.parametrize(
    ("names", "eval_only", "message"),
    [
        (["bus", "car", "zebra"], True, "class 'bus' is 'car' in the data"),
        (["bus", "car", "zebra"], False, "class 'bus' is 'car' in the data"),
        (["car", "bus"], True, "for 2 classes that differ from the 3"),
        (["car", "bus"], False, None),  # the layers that count classes begin anew
        (["car", "bus", "zebra"], True, None),
        (None, True, None),
    ],
)
def test_weights_for_other_classes(
    names: list[str] | None, eval_only: bool, message: str | None, files: Path, tmp_path: Path
) -> None:
    content = {"model": {}} | ({} if names is None else {"class_names": names})
    torch.save(content, tmp_path / "weights.pth")
    opts = [f"train.init_checkpoint={tmp_path / 'weights.pth'}"]
    args = RunArguments(config_file=str(CONFIGS / BOXES), opts=opts, **data_of(BOXES, files))
    problems = weight_problems(describe(args), eval_only=eval_only)
    assert bool(problems) == (message is not None)
    assert message is None or message in problems[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: --config-file"),
        (["--config-file", "absent.py"], "No such config file: absent.py"),
        (["--config-file", "absent.py", "train.seed=1", "--output", "x"], "No such config file"),
        (["--config-file", "a.py", "--nothing"], "unrecognized arguments: --nothing"),
        (["--config-file", "a.py", "--num-gpus", "many"], "invalid int value: 'many'"),
        (["--config-file", str(CONFIGS / NANO), "train.device=tpu"], "got 'tpu'"),
    ],
)
def test_command_line(words: list[str], message: str) -> None:
    done = run_program(TOOLS / "train_net.py", *words)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr


def test_nothing_is_drawn_by_the_checks(files: Path) -> None:
    """A checked run begins with the numbers of one that was not checked."""
    args = RunArguments(
        config_file=str(CONFIGS / BOXES), output=str(files / "run"), **data_of(BOXES, files)
    )
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    check(describe(args))
    assert torch.equal(torch.rand(3), expected)
