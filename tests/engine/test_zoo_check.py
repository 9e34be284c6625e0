"""The check of the small recipes reads the scores that a run has written."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.engine.zoo_check import BARS, Bar, check_zoo, table
from tests.helpers.paths import CONFIGS


def test_recipes_of_the_table_exist_and_evaluate_their_metric() -> None:
    for bar in BARS:
        text = (CONFIGS / bar.config).read_text()
        assert f'"{bar.metric.split("/")[0]}"' in text
        assert 0 < bar.least < 100


def test_scores_are_compared_with_the_bars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], check: bool) -> None:
        folder = Path(command[command.index("--output") + 1])
        folder.mkdir(parents=True)
        lines = [{"set/segm/AP": 99.0}, {"set/segm/AP": 41.5}]
        (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))

    monkeypatch.setattr(subprocess, "run", run)
    bars = [Bar("A/low.py", "set/segm/AP", 41), Bar("A/high.py", "set/segm/AP", 42)]
    outcomes = check_zoo(tmp_path, bars=bars)
    assert [o.passed for o in outcomes] == [True, False]
    rows: list[Any] = [line.split("|") for line in table(outcomes).splitlines()[2:]]
    assert [[cell.strip() for cell in row[1:5]] for row in rows] == [
        ["low", "AP", "41.50", "41"],
        ["high", "AP", "41.50", "42"],
    ]
    assert len(check_zoo(tmp_path / "one", bars=bars, only="high")) == 1
    with pytest.raises(ValueError, match=r"No recipe matches 'none'. Known: A/low.py, A/high.py"):
        check_zoo(tmp_path, bars=bars, only="none")
