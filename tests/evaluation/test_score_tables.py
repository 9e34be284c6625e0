"""Tables of scores as a terminal shows them."""

import math

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: see tools/install_detectron2.py")
from focalnet_det.evaluation import (
    overall_table,
    per_class_table,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_tables_fit_80_columns():
    results = {
        "bbox": {"AP": 41.237, "AP50": 60.0, "APs": math.nan, "AP-[red]cat": 3.2},
        "segm": {"AP": 100.0},
    }
    rows = overall_table(results).splitlines()
    assert cells(rows[0]) == ["task", "AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert cells(rows[2]) == ["bbox", "41.24", "60.00", "-", "-", "-", "-"]
    assert cells(rows[3]) == ["segm", "100.00", "-", "-", "-", "-", "-"]
    rows = per_class_table(results, {"[red]cat": 3, "long name " * 12: 0}).splitlines()
    assert cells(rows[0]) == ["class", "box AP", "mask AP", "instances"]
    assert cells(rows[2]) == ["[red]cat", "3.20", "-", "3"]
    assert max(map(len, rows)) <= 80
    assert all(row.isascii() for row in rows)
