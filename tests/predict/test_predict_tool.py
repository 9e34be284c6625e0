"""tools/predict.py, as a user calls it."""

import json
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
pytest.importorskip("av", reason="PyAV is missing: pip install av")

from pycocotools.coco import COCO

from focalnet_det.predict.job import JobOptions, predict_sources
from focalnet_det.predict.predictor import Predictor
from focalnet_det.predict.results import read_lines
from focalnet_det.predict.sources import find_sources
from focalnet_det.predict.video import VideoWriter, open_video
from tests.helpers.paths import TOOLS

Train = Callable[[str], Path]


def test_inputs_are_expanded(tmp_path: Path) -> None:
    for name in ("a/x.jpg", "a/b/y.PNG", "a/x.png", "a/notes.md", "clip.mp4", "z.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("z.jpg\n\nmissing.jpg\n")

    def found(*inputs: str) -> dict[str, str]:
        sources = find_sources([str(tmp_path / item) for item in inputs])
        return {s.name: str(s.path.relative_to(tmp_path)) for s in sources}

    # Two files of one stem keep their suffixes.
    assert found("a") == {"b/y": "a/b/y.PNG", "x.jpg": "a/x.jpg", "x.png": "a/x.png"}
    assert found("*.jpg", "z.jpg") == {"z": "z.jpg"}
    assert found("list.txt") == {"z": "z.jpg", "missing": "missing.jpg"}
    assert [s.is_video for s in find_sources([tmp_path / "clip.mp4"])] == [True]
    for item, message in {"b": "does not exist", "*.tif": "No file matches"}.items():
        with pytest.raises(ValueError, match=message):
            found(item)


def test_videos_are_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    frames = [np.full((33, 48, 3), value, np.uint8) for value in (0, 100, 200)]

    def record(broken: bool) -> None:
        with VideoWriter(path, Fraction(5)) as video:
            for frame in frames:
                video.add(frame)
            assert not broken

    with pytest.raises(AssertionError):
        record(broken=True)
    assert list(tmp_path.iterdir()) == []
    record(broken=False)
    rate, read = open_video(path)
    values = [round(float(frame.mean())) for frame in read]
    assert rate == 5
    # H.264 loses a little.
    assert values == pytest.approx([0, 100, 200], abs=4)
    path.write_text("no video")
    with pytest.raises(ValueError, match="Cannot read video"):
        open_video(path)


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOLS / "predict.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_folder_with_a_video_and_a_broken_file(
    trained: Train, shapes: Path, tmp_path: Path
) -> None:
    inputs, output = tmp_path / "in", tmp_path / "out"
    inputs.mkdir()
    pictures = [
        Image.open(path).convert("RGB") for path in sorted((shapes / "images/val").iterdir())
    ]
    for number, picture in enumerate(pictures):
        picture.save(inputs / f"{number}.png")
    (inputs / "bad.jpg").write_text("no picture")
    with VideoWriter(inputs / "clip.mp4", Fraction(5)) as video:
        for picture in pictures:
            video.add(np.asarray(picture))
    options = ("--output", output, "--threshold", 0.02, "--batch-size", 2, "--device", "cpu")
    done = call(trained("mask_rcnn"), inputs, *options)
    assert done.returncode == 0, done.stderr
    assert f"Predicted 3 files: {output}" in done.stdout
    assert "Could not read 1 files:\n  bad: Cannot read image" in done.stdout
    written = {str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()}
    files = {"pictures/0.jpg", "pictures/1.jpg", "videos/clip.mp4"}
    assert written == files | {"predictions.json", "predictions.jsonl"}
    assert len(list(open_video(output / "videos/clip.mp4")[1])) == 2

    # The JSON is a COCO file, and its numbers are those of the Python call.
    coco = COCO(str(output / "predictions.json"))
    assert sorted(image["file_name"] for image in coco.dataset["images"]) == [
        *(str(inputs / f"{number}.png") for number in (0, 1)),
        *(f"{inputs / 'clip.mp4'}#{number}" for number in (0, 1)),
    ]
    first = next(i for i in coco.dataset["images"] if i["file_name"].endswith("0.png"))
    rows = coco.imgToAnns[first["id"]]
    expected = Predictor(trained("mask_rcnn"), device="cpu", threshold=0.02)(inputs / "0.png")
    assert [row["score"] for row in rows] == pytest.approx(
        expected.instances.scores.tolist(), abs=1e-5
    )
    names = [coco.cats[row["category_id"]]["name"] for row in rows]
    assert names == expected.names

    # Again: nothing is done twice; what could not be read is tried again.
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.jpg")}
    pictures[0].save(inputs / "bad.jpg")
    again = call(trained("mask_rcnn"), inputs, *options)
    assert again.returncode == 0, again.stderr
    assert "Predicted 4 files, 3 of them by an earlier start" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    other = call(trained("mask_rcnn"), inputs, "--output", output, "--device", "cpu")
    assert other.returncode == 1
    assert "holds predictions of another job" in other.stderr


@pytest.mark.slow
def test_segments_are_written_as_the_evaluation_writes_them(
    trained: Train, shapes: Path, tmp_path: Path
) -> None:
    """In COCO's panoptic format, in the numbering of the dataset's own file."""
    run = trained("panoptic_fpn")
    predictor = Predictor(run, device="cpu")
    predict_sources(predictor, [shapes / "images/val"], JobOptions(output=tmp_path, pictures=False))
    actual = json.loads((tmp_path / "panoptic.json").read_text())
    truth = json.loads((shapes / "annotations/panoptic_val.json").read_text())
    scored = json.loads(next((run / "evaluation").rglob("panoptic_results.json")).read_text())
    numbered = {c["id"]: c["name"] for c in truth["categories"]}
    assert {c["id"]: c["name"] for c in actual["categories"]}.items() >= numbered.items()
    stems = {i["id"]: Path(i["file_name"]).stem for i in actual["images"]}
    expected = {Path(a["file_name"]).stem: a for a in scored["annotations"]}
    for annotation in actual["annotations"]:
        wanted = expected[stems[annotation["image_id"]]]
        assert [s["category_id"] for s in annotation["segments_info"]] == [
            s["category_id"] for s in wanted["segments_info"]
        ]
        ids = np.asarray(Image.open(tmp_path / annotation["file_name"])).astype(int)
        present = set(np.unique(ids @ [1, 256, 65536])) - {0}
        assert present == {s["id"] for s in annotation["segments_info"]}


@pytest.mark.slow
def test_an_interrupted_job_goes_on(trained: Train, shapes: Path, tmp_path: Path) -> None:
    predictor = Predictor(trained("upernet"), device="cpu")
    images = sorted((shapes / "images/val").iterdir())
    predict_sources(predictor, images[:1], JobOptions(output=tmp_path))
    journal = tmp_path / "predictions.jsonl"
    # As a kill in the middle of a line leaves it.
    journal.write_text(journal.read_text() + '{"name": "half')
    summary = predict_sources(predictor, images, JobOptions(output=tmp_path))
    assert (summary.predicted, summary.skipped, summary.errors) == (2, 1, {})
    assert len(list(read_lines(journal))) == 3
    for path in images:
        labels = np.asarray(Image.open(tmp_path / f"labels/{path.stem}.png"))
        assert np.array_equal(labels, predictor(path).semantic.numpy())


@pytest.mark.slow
def test_wrong_commands_are_one_line(trained: Train, tmp_path: Path) -> None:
    run = trained("mask_rcnn")
    (tmp_path / "a.jpg").write_text("x")
    for arguments, message in {
        (run,): "Nothing to predict",
        (run, tmp_path / "none"): "does not exist",
        (run, tmp_path / "a.jpg", "--output", tmp_path / "o"): "None of 1 files could be read",
        (tmp_path, tmp_path / "a.jpg"): "holds no checkpoint",
        (run, tmp_path / "a.jpg", "--batch-size", 0): "--batch-size must be 1 or more",
    }.items():
        done = call(*arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()[-1:]) == 1
        assert "Traceback" not in done.stderr
