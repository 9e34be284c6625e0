"""Files of predictions, worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import Metadata

from focalnet_det.predict.prediction import Prediction
from focalnet_det.predict.results import ResultsWriter


@pytest.fixture
def metadata() -> Metadata:
    """One thing and one stuff, in the separated numbering of panoptic FPN."""
    metadata = Metadata(name="by hand")
    metadata.set(
        thing_classes=["cell"],
        stuff_classes=["things", "glass"],
        thing_dataset_id_to_contiguous_id={7: 0},
        stuff_dataset_id_to_contiguous_id={21: 1},
    )
    return metadata


def test_segments_have_the_ids_of_the_dataset(tmp_path: Path, metadata: Metadata) -> None:
    segments = [
        {"id": 1, "isthing": True, "category_id": 0, "score": 0.75},
        {"id": 300, "isthing": False, "category_id": 1, "area": 2},
    ]
    output = {"panoptic_seg": (torch.tensor([[1, 300, 300]]), segments)}
    prediction = Prediction(output, Image.new("RGB", (3, 1)), metadata)
    assert [segment["name"] for segment in prediction.panoptic[1]] == ["cell", "glass"]
    writer = ResultsWriter(tmp_path, {"job": 1}, metadata)
    writer.add("a", [writer.describe(prediction, "a.jpg", "a")])
    assert writer.finish() == [tmp_path / "panoptic.json"]
    content = json.loads((tmp_path / "panoptic.json").read_text())
    assert content["images"] == [{"id": 1, "file_name": "a.jpg", "height": 1, "width": 3}]
    rows = [{"id": 1, "category_id": 7, "score": 0.75}, {"id": 300, "category_id": 21}]
    labels = {"image_id": 1, "file_name": "labels/a.png", "segments_info": rows}
    assert content["annotations"] == [labels]
    assert content["categories"] == [
        {"id": 21, "name": "glass", "isthing": 0},
        {"id": 7, "name": "cell", "isthing": 1},
    ]
    # 300 = 44 + 256 * 1.
    colors = np.asarray(Image.open(tmp_path / "labels/a.png"))
    assert colors.tolist() == [[[1, 0, 0], [44, 1, 0], [44, 1, 0]]]


def test_many_classes_of_pixels_fit_into_the_label_file(tmp_path: Path, metadata: Metadata) -> None:
    scores = torch.zeros(400, 1, 2)
    scores[[3, 399], 0, [0, 1]] = 1.0
    prediction = Prediction({"sem_seg": scores}, Image.new("RGB", (2, 1)), metadata)
    writer = ResultsWriter(tmp_path, {"job": 1}, metadata)
    writer.describe(prediction, "a.jpg", "sub/a")
    assert np.asarray(Image.open(tmp_path / "labels/sub/a.png")).tolist() == [[3, 399]]


def test_another_job_is_refused_and_a_cut_line_is_left_out(
    tmp_path: Path, metadata: Metadata
) -> None:
    ResultsWriter(tmp_path, {"job": 1}, metadata).add_error("a", "no image")
    journal = tmp_path / "predictions.jsonl"
    journal.write_text(journal.read_text() + '{"name": "b", "fra')
    again = ResultsWriter(tmp_path, {"job": 1}, metadata)
    assert again.errors == {"a": "no image"}
    assert len(journal.read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="predictions of another job"):
        ResultsWriter(tmp_path, {"job": 2}, metadata)
    assert ResultsWriter(tmp_path, {"job": 2}, metadata, overwrite=True).done == {}
