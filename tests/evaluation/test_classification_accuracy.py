"""Accuracies against timm's function and numbers worked out by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.evaluation.classification_accuracy import ClassificationEvaluator
from focalnet_det.evaluation.reconstruction import ReconstructionEvaluator


def evaluated(
    logits: torch.Tensor, labels: list[int], names: list[str], **options: Any
) -> dict[str, float]:
    evaluator = ClassificationEvaluator(class_names=names, distributed=False, **options)
    inputs = [{"file_name": f"{i}.png", "label": label} for i, label in enumerate(labels)]
    evaluator.process(inputs, [{"class_scores": row} for row in logits])
    return evaluator.evaluate()["classification"]


def test_worked_example(tmp_path: Path) -> None:
    """Two of four images are right; class c has none, and b is found once in two."""
    logits = torch.tensor([[3.0, 0, 0], [2, 1, 0], [0, 2, 1], [0, 2, 1]]).log_softmax(1)
    metrics = evaluated(logits, [0, 1, 1, 0], ["a", "b", "c"], output_dir=tmp_path)
    assert (metrics["top1"], metrics["top5"], metrics["mean_top1"]) == (50, 100, 50)
    assert (metrics["top1-a"], metrics["top1-b"]) == (50, 50)
    assert math.isnan(metrics["top1-c"])
    content = json.loads((tmp_path / "classification_metrics.json").read_text())
    assert content["confusion"] == [[0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 1]]
    assert content["metrics"]["top1-c"] is None
    # Probabilities of the true class: e^3/(e^3+2), e/(e^2+e+1), e^2/(1+e^2+e), 1/(1+e^2+e).
    assert [row["file_name"] for row in content["worst"]] == ["3.png", "1.png", "2.png", "0.png"]
    e = math.e
    assert content["worst"][0]["probability"] == pytest.approx(1 / (1 + e**2 + e))
    assert content["worst"][0]["predicted"] == [1, 2, 0]


def test_accuracy_is_that_of_timm() -> None:
    timm_utils = pytest.importorskip("timm.utils")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 30, generator=generator)
    labels = torch.randint(30, (200,), generator=generator)
    metrics = evaluated(logits, labels.tolist(), [str(i) for i in range(30)])
    top1, top5 = timm_utils.accuracy(logits, labels, topk=(1, 5))
    assert (metrics["top1"], metrics["top5"]) == (
        pytest.approx(float(top1)),
        pytest.approx(float(top5)),
    )
    right = (logits.argmax(1) == labels).numpy()
    means = [100 * right[(labels == k).numpy()].mean() for k in range(30) if (labels == k).any()]
    assert metrics["mean_top1"] == pytest.approx(np.mean(means))


def test_truth_scores_100() -> None:
    logits = 9 * torch.eye(7)
    metrics = evaluated(logits, list(range(7)), list("abcdefg"))
    assert set(metrics.values()) == {100.0}


def test_outputs_beyond_the_classes_do_not_count() -> None:
    """As published 22k heads are evaluated on ImageNet-1k."""
    logits = torch.tensor([[0.0, 1, 9, 9], [2.0, 1, 9, 9]])
    assert evaluated(logits, [1, 0], ["a", "b"])["top1"] == 100
    with pytest.raises(ValueError, match="predicts 1 classes, but the dataset has 2"):
        evaluated(logits[:, :1], [1, 0], ["a", "b"])


def test_reconstruction_is_the_mean_loss(tmp_path: Path) -> None:
    evaluator = ReconstructionEvaluator(output_dir=tmp_path, distributed=False)
    assert evaluator.evaluate() == {}
    evaluator.process([{}], [{"masked_image": {"loss": 0.5}}])
    evaluator.process([{}], [{"masked_image": {"loss": 1.0}}])
    assert evaluator.evaluate() == {"masked_images": {"L1": 0.75}}
    content = json.loads((tmp_path / "reconstruction_metrics.json").read_text())
    assert content == {"metrics": {"L1": 0.75}, "images": 2}
