"""Ends of toy trainings, compared."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

# What depends on the clock.
TIMES = ("time", "data_time")


def lines(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.json").open()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def best(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "model_best.pth", weights_only=True)


def assert_same_end(torn: Path, whole: Path) -> None:
    """Weights, averaged weights, best, its score, metrics with all evaluations, and the names."""
    assert lines(torn) == lines(whole)
    assert (torn / "evaluation/results.json").read_text() == (
        whole / "evaluation/results.json"
    ).read_text()
    for name in ("model_final.pth", "model_ema.pth", "model_best.pth"):
        first, second = (torch.load(d / name, weights_only=True) for d in (torn, whole))
        assert all(torch.equal(first["model"][k], t) for k, t in second["model"].items()), name
        assert first.get("score") == second.get("score")
        assert first.get("iteration") == second.get("iteration")
        if "trainer" in second:
            assert str(first["trainer"]["random"]) == str(second["trainer"]["random"])
    files = [
        {p.name for p in folder.iterdir() if not p.name.startswith("events.out")}
        for folder in (torn, whole)
    ]
    assert files[0] == files[1]


def save_pictures_without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the files of pictures with other bytes: drawing takes half of the time of a toy run."""

    def save(self: Figure, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"a picture")

    monkeypatch.setattr(Figure, "savefig", save)


OPTIONS: dict[str, Any] = {
    "iterations": 8,
    "eval_period": 3,
    "keep_best": "segm/AP",
    "ema_decay": 0.9,
    "scores": [0, 0, 50, 0, 0, 40, 0, 45],
}
