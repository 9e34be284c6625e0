"""The check of panoptic data sets: each fault is found."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
from focalnet_det.data.doctor.panoptic_doctor import verify_panoptic
from tests.helpers.panoptic_files import run_script


@pytest.fixture
def own(shapes: Path, tmp_path: Path) -> Path:
    """A copy of the validation set, to break."""
    for folder in ("panoptic_val", "images"):
        (tmp_path / folder).mkdir()
    for path in (shapes / "images/val").iterdir():
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    for path in (shapes / "panoptic_val").iterdir():
        (tmp_path / "panoptic_val" / path.name).write_bytes(path.read_bytes())
    text = (shapes / "annotations/panoptic_val.json").read_text()
    content = json.loads(text)
    used = {s["category_id"] for a in content["annotations"] for s in a["segments_info"]}
    content["categories"] = [c for c in content["categories"] if c["id"] in used]
    (tmp_path / "panoptic_val.json").write_text(json.dumps(content))
    return tmp_path


def problems(own: Path) -> dict[str, Any]:
    findings = verify_panoptic(own / "panoptic_val.json", own / "panoptic_val", own / "images")
    return {finding.problem: finding for finding in findings}


def first_segments(content: dict) -> list[dict]:
    return content["annotations"][0]["segments_info"]


BREAK_JSON = {
    "duplicate segment ids": lambda c: first_segments(c).append(first_segments(c)[0]),
    "segments without pixels": lambda c: first_segments(c).append(
        {**first_segments(c)[0], "id": 77}
    ),
    "segments with id 0": lambda c: first_segments(c).append({**first_segments(c)[0], "id": 0}),
    "segments with an unknown category": lambda c: first_segments(c)[0].update(category_id=1000),
    "pixels of an unlisted segment": lambda c: first_segments(c).pop(0),
    "areas that disagree with the PNG": lambda c: first_segments(c)[0].update(area=5),
    "boxes that disagree with the PNG": lambda c: first_segments(c)[0].update(bbox=[0, 0, 1, 1]),
    "categories that are both thing and stuff": lambda c: c["categories"].append(
        {**c["categories"][0], "isthing": 1 - c["categories"][0]["isthing"]}
    ),
    "duplicate categories": lambda c: c["categories"].append(c["categories"][0]),
    "images without annotation": lambda c: c["images"].append({"id": 1, "file_name": "1.jpg"}),
    "images annotated twice": lambda c: c["annotations"].append(c["annotations"][0]),
    "annotations of an unlisted image": lambda c: c["images"].pop(0),
    "missing images": lambda c: c["images"][0].update(file_name="absent.jpg"),
    "missing PNGs": lambda c: c["annotations"][0].update(file_name="absent.png"),
    "classes without segments": lambda c: c["categories"].append(
        {"id": 99, "name": "rare", "isthing": 1}
    ),
    "missing things or stuff": lambda c: [c.update(isthing=1) for c in c["categories"]],
}

NOT_FATAL = {
    "areas that disagree with the PNG",
    "boxes that disagree with the PNG",
    "images without annotation",
    "classes without segments",
}


@pytest.mark.parametrize("problem", BREAK_JSON)
def test_verification_finds(problem: str, own: Path) -> None:
    assert problems(own) == {}
    path = own / "panoptic_val.json"
    content = json.loads(path.read_text())
    BREAK_JSON[problem](content)
    path.write_text(json.dumps(content))
    found = problems(own)
    assert problem in found
    assert found[problem].fatal == (problem not in NOT_FATAL)
    # A category that is listed twice repeats its id and its name.
    assert len(found[problem].examples) == (2 if "categories" in problem else 1)


def test_verification_finds_broken_files(own: Path) -> None:
    first, second, third = sorted((own / "panoptic_val").iterdir())
    Image.fromarray(np.array(Image.open(first))[:40]).save(first)
    Image.open(second).convert("L").save(second)
    third.write_bytes(b"no picture")
    sorted((own / "images").iterdir())[2].write_bytes(b"nor this")
    found = problems(own)
    assert len(found["PNGs whose size differs from the image"].examples) == 1
    assert len(found["unreadable PNGs"].examples) == 2
    assert len(found["unreadable images"].examples) == 1


def test_verification_from_the_command_line(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--panoptic-json", own / "panoptic_val.json", "--images", own / "images")
    assert run_script("tools/verify_dataset.py", *arguments) == 0
    assert capsys.readouterr().out == "No problems found.\n"
    content = json.loads((own / "panoptic_val.json").read_text())
    first_segments(content)[0]["category_id"] = 1000
    (own / "panoptic_val.json").write_text(json.dumps(content))
    assert run_script("tools/verify_dataset.py", *arguments) == 1
    assert "ERROR: segments with an unknown category (1)" in capsys.readouterr().out
    assert run_script("tools/verify_dataset.py", *arguments[:2]) == 2
    assert "label folders (--sem-images" in capsys.readouterr().err


def test_real_panoptic_data_has_no_fatal_problem(shared_data: Path) -> None:
    root = shared_data / "coco_panoptic"
    for split in ("train2017", "val2017"):
        findings = verify_panoptic(
            root / f"annotations/panoptic_{split}.json",
            root / f"panoptic_{split}",
            root / "images" / split,
        )
        assert not [f for f in findings if f.fatal]
