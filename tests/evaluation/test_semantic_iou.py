"""SemanticEvaluator against a confusion matrix and boundaries counted in plain loops."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import MetadataCatalog
from hotcoco.metrics import pixel_confusion

from focalnet_det.data.io.labels import LabelRule
from focalnet_det.evaluation import SemanticEvaluator, build_evaluator
from focalnet_det.evaluation.semantic_iou import boundary_counts, confusion_of
from tests.helpers.processes import in_two_processes

NAMES = ["wall", "ghost", "sky", "phantom", "car"]  # "ghost" is only predicted, "phantom" is not
ABSENT = ("ghost", "phantom")


def maps(count: int = 4, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Truth with ignored pixels and no ghost or phantom, and predictions that are half right."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        size = tuple(rng.integers(9, 25, 2))
        truth = rng.choice([0, 2, 4, 255], size=size, p=[0.5, 0.2, 0.15, 0.15]).astype(np.uint8)
        guess = rng.choice([0, 1, 2, 4], size=size)
        predicted = np.where((rng.random(size) < 0.5) & (truth != 255), truth, guess)
        result.append((truth, predicted))
    return result


def scores(predicted: np.ndarray) -> torch.Tensor:
    one_hot = torch.nn.functional.one_hot(torch.as_tensor(predicted, dtype=torch.long), len(NAMES))
    return one_hot.permute(2, 0, 1).float() * 2 - 1


def run(evaluator: SemanticEvaluator, pairs: list[Any], folder: Path, **fields: Any) -> None:
    for index, (truth, predicted) in enumerate(pairs):
        path = folder / f"{index}.png"
        Image.fromarray(truth).save(path)
        record = {"file_name": f"/images/{index}.jpg", "sem_seg_file_name": str(path), **fields}
        evaluator.process([record], [{"sem_seg": scores(predicted)}])


def expected_metrics(pairs: list[Any]) -> dict[str, float]:
    """By the definitions, one pixel at a time."""
    table = [[0] * len(NAMES) for _ in NAMES]
    for truth, predicted in pairs:
        for t, p in zip(truth.ravel().tolist(), predicted.ravel().tolist(), strict=True):
            if t != 255:
                table[t][p] += 1
    total = sum(map(sum, table))
    metrics = {"pACC": 100 * (sum(table[k][k] for k in range(5)) / total)}
    ious, accuracies, weighted = [], [], 0.0
    for k, name in enumerate(NAMES):
        hits, rows, columns = table[k][k], sum(table[k]), sum(row[k] for row in table)
        if rows == 0:
            metrics[f"IoU-{name}"] = metrics[f"ACC-{name}"] = math.nan
            continue
        ious.append(hits / (rows + columns - hits))
        accuracies.append(hits / rows)
        weighted += rows / total * ious[-1]
        metrics[f"IoU-{name}"], metrics[f"ACC-{name}"] = 100 * ious[-1], 100 * accuracies[-1]
    assert len(ious) == 3
    metrics["mIoU"], metrics["mACC"] = 100 * np.mean(ious), 100 * np.mean(accuracies)
    return metrics | {"fwIoU": 100 * weighted}


def assert_as_expected(actual: dict[str, float], pairs: list[Any]) -> None:
    expected = expected_metrics(pairs)
    for name, value in expected.items():
        if name == "fwIoU":  # a sum, whose order decides the last bit
            assert actual[name] == pytest.approx(value, rel=1e-14)
        else:
            assert actual[name] == value or (math.isnan(actual[name]) and math.isnan(value)), name


def test_equals_plain_loops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = maps()
    evaluator = SemanticEvaluator(class_names=NAMES, output_dir=tmp_path / "out")
    run(evaluator, pairs, tmp_path)
    with caplog.at_level("INFO"):
        metrics = evaluator.evaluate()["sem_seg"]
    assert_as_expected(metrics, pairs)
    assert 30 < metrics["mIoU"] < 70
    assert "excluded from the means): ghost, phantom" in caplog.text
    saved = json.loads((tmp_path / "out/sem_seg_metrics.json").read_text())
    assert saved["metrics"]["mIoU"] == metrics["mIoU"]
    assert saved["metrics"]["IoU-ghost"] is None
    assert np.array(saved["confusion"]).sum() == sum((t != 255).sum() for t, _ in pairs)
    single = SemanticEvaluator(class_names=NAMES)
    run(single, pairs[:1], tmp_path)
    assert saved["image_mIoU"]["/images/0.jpg"] * 100 == pytest.approx(
        single.evaluate()["sem_seg"]["mIoU"]
    )


def test_counts_of_the_gpu_path_equal_hotcocos_and_plain_loops() -> None:
    for truth, predicted in maps():
        counts = confusion_of(torch.from_numpy(truth), torch.from_numpy(predicted), len(NAMES))
        assert np.array_equal(counts, pixel_confusion(truth, predicted, 5, ignore_index=255))
        expected = np.zeros((5, 5), dtype=int)
        for t, p in zip(truth.ravel(), predicted.ravel(), strict=True):
            if t != 255:
                expected[t, p] += 1
        assert counts.tolist() == expected.tolist()
    ignored = torch.full((3, 4), 255)
    assert confusion_of(ignored, torch.zeros(3, 4), 5).sum() == 0


def test_a_class_that_is_wrongly_predicted_lowers_the_others(tmp_path: Path) -> None:
    truth = np.zeros((2, 2), dtype=np.uint8)
    evaluator = SemanticEvaluator(class_names=NAMES)
    run(evaluator, [(truth, np.array([[0, 0], [0, 1]]))], tmp_path)
    metrics = evaluator.evaluate()["sem_seg"]
    assert metrics["mIoU"] == metrics["IoU-wall"] == metrics["pACC"] == 75
    assert math.isnan(metrics["IoU-ghost"])


def test_truth_as_prediction_is_perfect(tmp_path: Path) -> None:
    pairs = [(truth, np.where(truth == 255, 1, truth)) for truth, _ in maps()]
    evaluator = SemanticEvaluator(class_names=NAMES)
    run(evaluator, pairs, tmp_path)
    metrics = evaluator.evaluate()["sem_seg"]
    for name in ("mIoU", "fwIoU", "mACC", "pACC", "mBIoU"):
        assert metrics[name] == pytest.approx(100, abs=1e-12)


def test_labels_that_start_at_1(tmp_path: Path) -> None:
    pairs = maps()
    shifted = [(np.where(t == 255, 0, t + 1).astype(np.uint8), p) for t, p in pairs]
    evaluator = SemanticEvaluator(class_names=NAMES)
    run(evaluator, shifted, tmp_path, label_rule=LabelRule(num_classes=5, first_label=1))
    assert_as_expected(evaluator.evaluate()["sem_seg"], pairs)


def boundary_by_loops(truth: np.ndarray, predicted: np.ndarray, width: int) -> np.ndarray:
    height, length = truth.shape
    predicted = np.where(truth == 255, 255, predicted)

    def is_boundary(labels: np.ndarray, y: int, x: int) -> bool:
        for dy in range(-width, width + 1):
            for dx in range(-width, width + 1):
                inside = 0 <= y + dy < height and 0 <= x + dx < length
                if not inside or labels[y + dy, x + dx] != labels[y, x]:
                    return True
        return False

    counts = np.zeros((2, 5), dtype=int)
    for k in range(5):
        for y in range(height):
            for x in range(length):
                a = truth[y, x] == k and is_boundary(truth, y, x)
                b = predicted[y, x] == k and is_boundary(predicted, y, x)
                counts[0, k] += a and b
                counts[1, k] += a or b
    return counts


@pytest.mark.parametrize("width", [1, 2])
def test_boundary_counts_equal_plain_loops(width: int) -> None:
    rng = np.random.default_rng(2)
    blocks = rng.choice([0, 2, 4, 255], size=(4, 5)).repeat(6, 0).repeat(6, 1)
    predicted = np.roll(np.where(blocks == 255, 1, blocks), 1, axis=1)
    actual = boundary_counts(blocks, predicted, 5, width)
    np.testing.assert_array_equal(actual, boundary_by_loops(blocks, predicted, width))
    assert 0 < actual[0].sum() < actual[1].sum()


def test_boundary_iou_by_hand(tmp_path: Path) -> None:
    # 100 x 100: a boundary is 3 px wide. Two halves, and the prediction's edge 1 px to the right.
    truth = np.zeros((100, 100), dtype=np.uint8)
    truth[:, 50:] = 2
    predicted = np.zeros_like(truth)
    predicted[:, 51:] = 2
    evaluator = SemanticEvaluator(class_names=NAMES)
    run(evaluator, [(truth, predicted)], tmp_path)
    metrics = evaluator.evaluate()["sem_seg"]
    # The left half's frame: 50 x 100 less 44 x 94; with its edge moved, 51 x 100 less 45 x 94.
    # Both: top and bottom 6 x 50, left 3 x 94, and columns 48, 49 of the right side.
    both = 6 * 50 + 3 * 94 + 2 * 94
    either = (50 * 100 - 44 * 94) + (51 * 100 - 45 * 94) - both
    assert metrics["BIoU-wall"] == pytest.approx(100 * both / either)
    assert metrics["IoU-wall"] == pytest.approx(100 * 50 / 51)


def test_saved_predictions(tmp_path: Path) -> None:
    pairs = maps(2)
    evaluator = SemanticEvaluator(class_names=NAMES, output_dir=tmp_path, save_predictions=True)
    run(evaluator, pairs, tmp_path)
    for index, (_, predicted) in enumerate(pairs):
        saved = np.asarray(Image.open(tmp_path / f"predictions/{index}.png"))
        np.testing.assert_array_equal(saved, predicted)
    with pytest.raises(ValueError, match="output_dir"):
        SemanticEvaluator(class_names=NAMES, save_predictions=True)


def test_predictions_of_subfolders_with_equal_file_names(tmp_path: Path) -> None:
    """City data sets number the images of each city from 0."""
    (first, second), root = maps(2), tmp_path / "images"
    evaluator = SemanticEvaluator(
        class_names=NAMES, output_dir=tmp_path / "out", save_predictions=True, image_root=root
    )
    evaluator.reset()
    for city, (truth, predicted) in (("bonn", first), ("ulm", second)):
        label = tmp_path / f"{city}.png"
        Image.fromarray(truth.astype(np.uint8)).save(label)
        scores = torch.from_numpy(np.arange(len(NAMES))[:, None, None] == predicted).float()
        record = {"file_name": str(root / city / "0.jpg"), "sem_seg_file_name": str(label)}
        evaluator.process([record], [{"sem_seg": scores}])
    for city, (_, predicted) in (("bonn", first), ("ulm", second)):
        saved = np.asarray(Image.open(tmp_path / f"out/predictions/{city}/0.png"))
        np.testing.assert_array_equal(saved, predicted)


def test_pictures_show_the_worst_images_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from focalnet_det.evaluation import semantic_iou as semantic

    evaluator = SemanticEvaluator(class_names=NAMES, output_dir=tmp_path, save_predictions=True)
    # The n-th image has n wrong rows of ten.
    truth = np.zeros((10, 10), dtype=np.uint8)
    names = []
    for wrong in range(8):
        predicted = truth.copy()
        predicted[:wrong] = 2
        path = tmp_path / f"labels{wrong}.png"
        Image.fromarray(truth).save(path)
        Image.fromarray(np.zeros((10, 10, 3), dtype=np.uint8)).save(tmp_path / f"{wrong}.png")
        names.append(str(tmp_path / f"{wrong}.png"))
        record = {"file_name": names[-1], "sem_seg_file_name": str(path)}
        evaluator.process([record], [{"sem_seg": scores(predicted)}])
    drawn: list[Any] = []
    monkeypatch.setattr(semantic, "save_comparison", lambda rows, *_: drawn.extend(rows))
    evaluator.evaluate()
    assert [row[0] for row in drawn] == names[:1:-1]
    assert (drawn[0][2][:7] == 2).all()
    assert drawn[0][3] == "7.png: mIoU 30.0"
    monkeypatch.undo()
    evaluator.evaluate()
    for name in ("iou.png", "worst.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 5


def work(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    try:
        evaluator = SemanticEvaluator(class_names=NAMES)
        pairs = maps()
        part = pairs[:3] if rank == 0 else pairs[3:]
        own = Path(folder) / str(rank)
        own.mkdir()
        for index, (truth, predicted) in enumerate(part):
            path = own / f"{index}.png"
            Image.fromarray(truth).save(path)
            record = {"file_name": str(path), "sem_seg_file_name": str(path)}
            evaluator.process([record], [{"sem_seg": scores(predicted)}])
        result = evaluator.evaluate()
        (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    in_two_processes("tests.evaluation.test_semantic_iou", "work", tmp_path)
    assert json.loads((tmp_path / "1.json").read_text()) == {}
    actual = json.loads((tmp_path / "0.json").read_text())["sem_seg"]
    assert_as_expected(actual, maps())
    alone = SemanticEvaluator(class_names=NAMES)
    run(alone, maps(), tmp_path)
    assert actual["mBIoU"] == alone.evaluate()["sem_seg"]["mBIoU"]


@pytest.mark.parametrize(
    ("truth", "predicted", "classes", "message"),
    [
        (np.zeros((4, 5)), np.zeros((5, 4)), 5, r"0\.png is 4 x 5 .*5 x 4"),
        (np.full((4, 5), 9), np.zeros((4, 5)), 5, r"0\.png contains 9.*0 to 4.*--first-label"),
        (np.zeros((4, 5)), np.zeros((4, 5)), 7, "predicts 5 classes, but the dataset has 7"),
    ],
)
def test_bad_input(
    truth: np.ndarray, predicted: np.ndarray, classes: int, message: str, tmp_path: Path
) -> None:
    evaluator = SemanticEvaluator(class_names=[str(i) for i in range(classes)])
    rule = LabelRule(num_classes=classes)
    with pytest.raises(ValueError, match=message):
        run(evaluator, [(truth.astype(np.uint8), predicted)], tmp_path, label_rule=rule)


def test_nothing_to_score(tmp_path: Path) -> None:
    evaluator = SemanticEvaluator(class_names=NAMES)
    assert evaluator.evaluate() == {}
    run(evaluator, [(np.full((3, 3), 255, dtype=np.uint8), np.zeros((3, 3)))], tmp_path)
    assert all(math.isnan(value) for value in evaluator.evaluate()["sem_seg"].values())


def test_the_same_image_twice_counts_once(tmp_path: Path) -> None:
    pairs = maps(1)
    evaluator = SemanticEvaluator(class_names=NAMES)
    run(evaluator, pairs, tmp_path)
    run(evaluator, pairs, tmp_path)
    assert_as_expected(evaluator.evaluate()["sem_seg"], pairs)


def test_built_from_metadata(tmp_path: Path) -> None:
    name = "test_semantic_evaluator"
    metadata = MetadataCatalog.get(name)
    try:
        metadata.set(evaluator_type="sem_seg")
        with pytest.raises(KeyError, match="lacks stuff_classes"):
            build_evaluator(name)
        metadata.set(stuff_classes=NAMES)
        evaluator = build_evaluator(name, output_dir=tmp_path, save_predictions=True)
        run(evaluator, maps(1), tmp_path)
        assert (tmp_path / "predictions/0.png").is_file()
    finally:
        MetadataCatalog.remove(name)
