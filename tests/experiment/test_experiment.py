"""From config files, overrides and COCO files to an experiment; bad input is one line."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.config import LazyCall
from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import OmegaConf
from PIL import Image

from focalnet_det.errors import one_line_errors
from focalnet_det.experiment import (
    Experiment,
    RunArguments,
    TrainOptions,
    describe,
    load_config,
    read_experiment,
)
from focalnet_det.experiment.lazy import set_everywhere
from tests.helpers.paths import CONFIGS

TINY = CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_focalnet_tiny_srf_fpn_1x"
LAZY, YACS = TINY.with_suffix(".py"), TINY.with_suffix(".yaml")


def test_overrides_of_a_lazy_config() -> None:
    cfg = load_config(
        LAZY,
        [
            "optimizer.lr=2e-4",
            "schedule.epochs=3",
            "dataloader.test.0.num_workers=0",
            "model.backbone.bottom_up.focal_windows=[7,7,5,5]",
            # Arguments of a call may be added without a plus; new keys elsewhere need one.
            "model.backbone.bottom_up.frozen_stages=1",
            "+train.ddp.broadcast_buffers=False",
        ],
    )
    assert cfg.optimizer.lr == 2e-4
    assert cfg.dataloader.test[0].num_workers == 0
    assert cfg.model.backbone.bottom_up.focal_windows == [7, 7, 5, 5]
    assert cfg.model.backbone.bottom_up.frozen_stages == 1
    experiment = read_experiment(cfg)
    assert experiment.schedule.epochs == 3
    assert experiment.options.ddp == {"broadcast_buffers": False}
    assert "lr: 0.0002" in experiment.config_text


@pytest.mark.parametrize(
    "overrides",
    [
        ["SOLVER.BASE_LR", "2e-4", "MODEL.FOCALNET.FOCAL_WINDOWS", "[7,7,5,5]", "SEED", "5"],
        ["SOLVER.BASE_LR=2e-4", "MODEL.FOCALNET.FOCAL_WINDOWS=[7,7,5,5]", "SEED=5"],
        ["SOLVER.BASE_LR=2e-4", "SEED", "5", "MODEL.FOCALNET.FOCAL_WINDOWS=[7,7,5,5]"],
    ],
)
def test_overrides_of_a_yacs_config(overrides: list[str]) -> None:
    cfg = load_config(YACS, overrides)
    assert cfg.SOLVER.BASE_LR == 2e-4
    assert list(cfg.MODEL.FOCALNET.FOCAL_WINDOWS) == [7, 7, 5, 5]
    assert read_experiment(cfg).options.seed == 5


def test_whole_numbers_stand_for_floats_in_yacs() -> None:
    overrides = ["SOLVER.WEIGHT_DECAY", "0", "SOLVER.BACKBONE_MULTIPLIER=1", "SEED=3"]
    solver = load_config(YACS, overrides).SOLVER
    assert (solver.WEIGHT_DECAY, type(solver.WEIGHT_DECAY)) == (0.0, float)
    assert type(solver.BACKBONE_MULTIPLIER) is float


def test_yacs_values_may_contain_an_equals_sign() -> None:
    cfg = load_config(YACS, ["MODEL.WEIGHTS", "epoch=3.pth", "OUTPUT_DIR=run/lr=1"])
    assert cfg.MODEL.WEIGHTS == "epoch=3.pth"
    assert cfg.OUTPUT_DIR == "run/lr=1"


@pytest.mark.parametrize(
    ("path", "overrides", "error", "line"),
    [
        (
            LAZY,
            ["optimizer.lr_factor=1"],
            KeyError,
            "no key 'optimizer.lr_factor'. Did you mean 'lr_factors'?",
        ),
        (LAZY, ["train.sed=1"], KeyError, "The config has no key 'train.sed'."),
        (LAZY, ["trian.seed=1"], KeyError, "The config has no key 'trian.seed'."),
        (LAZY, ["seed=1"], KeyError, "The config has no key 'seed'."),
        (LAZY, ["train.seed.x=1"], KeyError, "The config has no key 'train.seed.x'."),
        (LAZY, ["dataloader.test.7.num_workers=0"], KeyError, "no key 'dataloader.test.7"),
        (LAZY, ["train.seed", "1"], ValueError, "key=value, got 'train.seed'"),
        (LAZY, ["train.output_dir=[a"], ValueError, "Invalid override"),
        (YACS, ["SOLVER.BASE_LT", "1"], KeyError, "The config has no key 'SOLVER.BASE_LT'."),
        (YACS, ["SLOVER.BASE_LR=1"], KeyError, "The config has no key 'SLOVER.BASE_LR'."),
        (YACS, ["SEED.X=1"], KeyError, "The config has no key 'SEED.X'."),
        (YACS, ["SOLVER.BASE_LR"], ValueError, "'SOLVER.BASE_LR' has no value"),
        (YACS, ["SOLVER.BASE_LR=fast"], ValueError, "Type mismatch"),
    ],
)
def test_bad_overrides(
    path: Path,
    overrides: list[str],
    error: type[Exception],
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(error):
        load_config(path, overrides)
    with pytest.raises(SystemExit), one_line_errors():
        load_config(path, overrides)
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert line in text


def test_missing_and_strange_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No such config file: .*absent\.py"):
        load_config(tmp_path / "absent.py", [])
    with pytest.raises(ValueError, match="No such config file"):
        load_config(tmp_path, [])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is neither a \.py .* nor a \.yaml"):
        load_config(tmp_path / "config.json", [])
    (tmp_path / "typo.yaml").write_text("SOLVER: {BASE_LT: 1.0}\n")
    with pytest.raises(KeyError, match=r"SOLVER\.BASE_LT"):
        load_config(tmp_path / "typo.yaml", [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"precision": "fp8"}, "'fp8'.*bf16, fp16, fp32"),
        ({"period_unit": "hours"}, "'hours'.*epochs, iterations"),
    ],
)
def test_bad_train_options(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainOptions(**fields)
    ((key, value),) = fields.items()
    with pytest.raises(ValueError, match=message):
        read_experiment(load_config(LAZY, [f"train.{key}={value}"]))


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert TrainOptions().device == "cpu"
    # Detectron2's default is cuda; whoever keeps it has not asked for a GPU.
    assert read_experiment(load_config(YACS, [])).options.device == "cpu"
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match="requires a GPU"):
            TrainOptions(device=device)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert TrainOptions().device == "cuda"
    assert TrainOptions(device="cuda:1").device == "cuda:1"


def test_periods() -> None:
    assert TrainOptions(period_unit="epochs").to_iterations(0.5, 7330) == 3665
    assert TrainOptions(period_unit="iterations").to_iterations(200, 7330) == 200
    assert TrainOptions().to_iterations(0, 7330) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.OPTIMIZER=LAMB"], "'LAMB'.*ADAMW, SGD"),
        (["SOLVER.LR_SCHEDULER_NAME=Poly"], "'Poly'.*WarmupMultiStepLR, WarmupCosineLR"),
        (["SOLVER.PRECISION=int8"], "'int8'"),
    ],
)
def test_bad_values_in_a_yacs_config(overrides: list[str], message: str) -> None:
    cfg = load_config(YACS, overrides)
    with pytest.raises(ValueError, match=message):
        read_experiment(cfg).optimizer(None)


def test_unknown_augmentation_policy() -> None:
    experiment = read_experiment(load_config(YACS, ["INPUT.POLICY=mosaic"]))
    with pytest.raises(ValueError, match=r"'mosaic'.*resize, multiscale_or_crop"):
        experiment.train_loader()


def test_yacs_options_and_schedule() -> None:
    cfg = load_config(
        YACS,
        [
            *("SOLVER.EPOCHS", "0", "SOLVER.MAX_ITER", "500", "SOLVER.STEPS", "(300, 400)"),
            *("SOLVER.PRECISION", "fp32", "SOLVER.AMP.ENABLED", "True"),
            *("SOLVER.CLIP_GRADIENTS.ENABLED", "True"),
            *("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"),
            *("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.25"),
            *("SOLVER.PERIOD_UNIT", "iterations", "TEST.EVAL_PERIOD", "70"),
            *("SOLVER.CHECKPOINT_PERIOD", "90", "TEST.MAX_DETS", "300"),
        ],
    )
    experiment = read_experiment(cfg)
    assert experiment.schedule.max_iter(7330) == 500
    assert experiment.schedule.milestones == (300, 400)
    options = experiment.options
    assert (options.precision, options.clip_norm, options.max_dets) == ("fp16", 0.25, 300)
    assert options.to_iterations(options.eval_period, 7330) == 70
    assert options.to_iterations(options.checkpoint_period, 7330) == 90


def test_output_and_report_of_the_command_line() -> None:
    for path in (LAZY, YACS):
        args = RunArguments(config_file=str(path), output="elsewhere", report=True)
        options = describe(args).options
        assert (options.output_dir, options.report) == ("elsewhere", True)


def test_set_num_classes_reaches_nested_calls_and_keeps_references() -> None:
    cfg = OmegaConf.create(
        {
            "num_classes": 80,
            "stages": [{"num_classes": 80, "depth": 3}],
            "head": LazyCall(SimpleNamespace)(
                num_classes="${num_classes}", inner={"num_classes": 80}
            ),
        },
        flags={"allow_objects": True},
    )
    set_everywhere(cfg, "num_classes", 5)
    assert cfg.num_classes == 5
    assert cfg.stages[0] == {"num_classes": 5, "depth": 3}
    assert cfg.head.num_classes == 5
    assert cfg.head.inner.num_classes == 5
    cfg.num_classes = 9
    assert cfg.head.num_classes == 9, "the reference was replaced by a number"
    assert cfg.stages[0].num_classes == 5


# COCO files of the user.

CATEGORIES = [{"id": 90, "name": "zebra"}, {"id": 3, "name": "car"}, {"id": 7, "name": "bus"}]


def coco_file(folder: Path, name: str, categories: list[dict[str, Any]] = CATEGORIES) -> Path:
    annotations = [
        {
            "id": i + 1,
            "image_id": 1,
            "category_id": category["id"],
            "bbox": [1, 2, 10, 20],
            "area": 200,
            "iscrowd": 0,
            "segmentation": [[1, 2, 11, 2, 11, 22, 1, 22]],
        }
        for i, category in enumerate(categories)
    ]
    images = [{"id": 1, "file_name": "1.png", "height": 64, "width": 64}]
    Image.new("RGB", (64, 64)).save(folder / "1.png")
    path = folder / name
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return path


def arguments(config: Path, **fields: Any) -> RunArguments:
    return RunArguments(
        config_file=str(config),
        **{k: v if isinstance(v, list | bool) else [str(v)] for k, v in fields.items()},
    )


def described(config: Path, **fields: Any) -> Experiment:
    return describe(arguments(config, **fields))


@pytest.mark.parametrize("config", [LAZY, YACS])
def test_coco_files(config: Path, tmp_path: Path) -> None:
    train, val = coco_file(tmp_path, "mine.json"), coco_file(tmp_path, "theirs.json")
    experiment = described(config, coco_json=train, images=tmp_path, val_json=val)
    assert experiment.settings.train_sets == ("mine_train",)
    assert list(experiment.test_loaders) == ["theirs_val"]
    # Contiguous classes in the order of the ids in the file: 3, 7, 90.
    records = DatasetCatalog.get("mine_train")
    assert [a["category_id"] for a in records[0]["annotations"]] == [2, 0, 1]
    assert records[0]["file_name"] == str(tmp_path / "1.png")
    for name in ("mine_train", "theirs_val"):
        assert MetadataCatalog.get(name).thing_classes == ["car", "bus", "zebra"]
    ids = MetadataCatalog.get("mine_train").thing_dataset_id_to_contiguous_id
    assert ids == {3: 0, 7: 1, 90: 2}
    heads = experiment.model().roi_heads
    assert heads.num_classes == 3
    assert heads.box_predictor.cls_score.out_features == 4
    assert heads.mask_head.predictor.out_channels == 3


def test_coco_files_into_every_num_classes_of_a_lazy_config(tmp_path: Path) -> None:
    train = coco_file(tmp_path, "mine.json")
    cfg = OmegaConf.create(described(LAZY, coco_json=train, images=tmp_path).config_text)
    assert cfg.model.roi_heads.num_classes == 3
    assert cfg.model.roi_heads.box_predictor.num_classes == 3
    assert cfg.model.roi_heads.mask_head.num_classes == 3


def test_detectron2s_test_time_augmentation_in_yacs(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    val = coco_file(tmp_path, "val.json")

    def views(*opts: str) -> Any:
        fixed = ["TEST.AUG.MIN_SIZES=(20,80)", "TEST.AUG.MAX_SIZE=72", "DATALOADER.NUM_WORKERS=0"]
        args = arguments(YACS, coco_json=val, images=tmp_path, val_json=val)
        args.opts = [*fixed, *opts]
        (loader,) = describe(args).test_loaders.values()
        ((record,),) = loader()
        return record.get("views")

    # 64 x 64 px at a short side of 20, and at 80, which is more than the longest side.
    sizes = [v["image"].shape for v in views("TEST.AUG.ENABLED=True", "TEST.AUG.FLIP=False")]
    assert sizes == [(3, 20, 20), (3, 72, 72)]
    assert len(views("TEST.AUG.ENABLED=True")) == 4


@pytest.mark.parametrize("config", [LAZY, YACS])
def test_several_files_of_one_name_are_several_data_sets(config: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    files = [str(coco_file(folder, "i.json")) for folder in folders]
    images = [str(folder) for folder in folders]
    experiment = described(config, coco_json=files, images=images, val_json=files)
    assert experiment.settings.train_sets == ("i_train", "i_train_2")
    found = [DatasetCatalog.get(n)[0]["file_name"] for n in experiment.settings.train_sets]
    assert found == [str(folder / "1.png") for folder in folders]
    assert list(experiment.test_loaders) == ["i_val", "i_val_2"]


def test_without_validation_file_nothing_is_evaluated(tmp_path: Path) -> None:
    experiment = described(LAZY, coco_json=coco_file(tmp_path, "a.json"), images=tmp_path)
    assert experiment.test_loaders == {}


def test_the_same_file_name_again_replaces_the_data_set(tmp_path: Path) -> None:
    for categories in (CATEGORIES, CATEGORIES[:1]):
        path = coco_file(tmp_path, "again.json", categories)
        settings = described(LAZY, coco_json=path, images=tmp_path).settings
        assert settings.train_sets == ("again_train",)
        records = DatasetCatalog.get("again_train")
        assert len(records[0]["annotations"]) == len(categories)
        assert settings.model.classes == len(categories)


@pytest.mark.parametrize("config", [LAZY, YACS])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coco_json": "good.json"}, "needs --images"),
        ({"val_json": "good.json", "eval_only": True}, "needs --images"),
        ({"val_json": "good.json", "images": ""}, "--images has no effect without --coco-json"),
        ({"val_json": "good.json", "val_images": ""}, "there is no training set"),
        (
            {"coco_json": "absent.json", "images": ""},
            r"Annotation file .*absent\.json does not exist",
        ),
        (
            {"coco_json": "good.json", "images": "no_folder"},
            "Image folder .*no_folder does not exist",
        ),
        ({"coco_json": "text.json", "images": ""}, r"text\.json is not a JSON file"),
        ({"coco_json": "binary.json", "images": ""}, r"binary\.json is not a JSON file"),
        ({"coco_json": "list.json", "images": ""}, "lacks annotations, categories, images"),
        ({"coco_json": "partial.json", "images": ""}, r"lacks annotations\.$"),
        ({"coco_json": "no_classes.json", "images": ""}, "missing categories"),
        (
            {"coco_json": "good.json", "images": "", "val_json": "other.json"},
            r"other categories than .*'dog', 'zebra'",
        ),
        (
            {"coco_json": "good.json", "images": "", "val_json": "order.json"},
            "other categories than .*another order",
        ),
        (
            {"coco_json": "good.json", "images": "", "val_json": "good.json", "val_images": "no"},
            "Image folder .* does not exist",
        ),
    ],
)
def test_bad_coco_files(config: Path, fields: dict[str, str], message: str, tmp_path: Path) -> None:
    coco_file(tmp_path, "good.json")
    coco_file(tmp_path, "other.json", [{"id": 90, "name": "dog"}, *CATEGORIES[1:]])
    swapped = [{"id": 3, "name": "bus"}, {"id": 7, "name": "car"}, CATEGORIES[0]]
    coco_file(tmp_path, "order.json", swapped)
    coco_file(tmp_path, "no_classes.json", [])
    (tmp_path / "text.json").write_text("images: 3")
    (tmp_path / "binary.json").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "partial.json").write_text('{"images": [], "categories": []}')
    paths = {key: value if value is True else tmp_path / value for key, value in fields.items()}
    with pytest.raises(ValueError, match=message):
        described(config, **paths)
