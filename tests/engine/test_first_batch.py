"""The picture of the first batch, which changes neither the batch nor any random stream."""

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks, Boxes, Instances

from focalnet_det.data.loader import TrainLoader
from focalnet_det.engine import run_pictures
from focalnet_det.engine.run_pictures import save_first_batch
from focalnet_det.visualization.draw_samples import sample_rows

NAME = "first_batch"


@pytest.fixture(autouse=True)
def dataset() -> Iterator[None]:
    MetadataCatalog.get(NAME).set(
        thing_classes=["cat", "dog"], stuff_classes=["sky", "grass"], stuff_colors=[(0, 0, 200)] * 2
    )
    yield
    MetadataCatalog.remove(NAME)
    assert NAME not in DatasetCatalog.list()


def experiment(folder: Path, pictures: int = 6) -> Any:
    options = SimpleNamespace(pictures=pictures, device="cpu", output_dir=str(folder))
    return SimpleNamespace(options=options, settings=SimpleNamespace(train_sets=(NAME,)))


def sample(masks: bool = True, labels: bool = False) -> dict[str, Any]:
    """A red image of 60 x 80 px with a square."""
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    image[0] = 200
    objects = Instances((60, 80))
    objects.gt_boxes = Boxes(torch.tensor([[20.0, 10, 50, 40]]))
    objects.gt_classes = torch.tensor([1])
    square = torch.zeros(1, 60, 80, dtype=torch.bool)
    square[:, 10:40, 20:50] = True
    if masks:
        objects.gt_masks = BitMasks(square)
    result = {"file_name": "a/b.png", "image": image, "instances": objects}
    return {**result, "sem_seg": torch.zeros(60, 80).long()} if labels else result


def states() -> str:
    return repr((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))


def test_the_picture_leaves_batch_and_random_states_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before, batch = states(), [sample(), sample(masks=False)]
    pixels = batch[0]["image"].clone()

    def restless(*args: Any, **options: Any) -> Any:
        random.random(), np.random.rand(), torch.rand(1)
        return sample_rows(*args, **options)

    monkeypatch.setattr(run_pictures, "sample_rows", restless)
    save_first_batch(experiment(tmp_path), batch, "RGB")
    assert states() == before
    assert torch.equal(batch[0]["image"], pixels)
    with Image.open(tmp_path / "train_samples.png") as picture:
        assert picture.width == 1440

    # A dataset that cannot be drawn does not stop the training.
    with caplog.at_level(logging.WARNING, "focalnet_det"):
        save_first_batch(experiment(tmp_path / "new"), [{"image": "none"}], "RGB")
    assert "Could not draw the first training batch" in caplog.text
    assert states() == before
    save_first_batch(experiment(tmp_path / "none", pictures=0), batch, "RGB")
    assert not (tmp_path / "none").exists()


def test_samples_are_drawn_with_masks_in_the_right_colors() -> None:
    metadata = MetadataCatalog.get(NAME)
    (row,) = sample_rows([sample(), sample(labels=True)], metadata, image_format="RGB")
    assert [title for title, _ in row.panels] == ["1 object, 80 x 60, b.png"] * 2
    plain, both = (picture.astype(int) for _, picture in row.panels)
    # Two of 80 x 60 px fill 1440 px with a gap of 8. The square is 0.45 of orange over red.
    assert plain.shape == (537, 716, 3)
    red, blended = [200, 0, 0], 0.55 * np.array([200, 0, 0]) + 0.45 * np.array([255, 127, 14])
    np.testing.assert_allclose(plain[220, 310], blended, atol=2)
    np.testing.assert_allclose(plain[450, 600], red, atol=2)
    # Classes of pixels lie under objects: 0.6 of blue over red.
    np.testing.assert_allclose(both[450, 600], [80, 0, 120], atol=2)
    (row,) = sample_rows([sample()], metadata, image_format="BGR")
    np.testing.assert_allclose(row.panels[0][1][900, 1200], [0, 0, 200], atol=2)


def test_the_loader_shows_its_very_first_batch_alone() -> None:
    def open_at(seed: int, start: int) -> Iterator[Any]:
        yield from ([{"number": n, "seed": seed}] for n in range(start, 3))

    loader = TrainLoader(open_at, num_images=3, batch_size=1)
    expected = list(loader)
    seen: list[Any] = []
    loader.on_first_batch = seen.append
    assert list(loader) == expected
    assert seen == expected[:1]
    # Of a training that continues, the first batch was drawn before.
    loader.start = 1
    assert list(loader) == expected[1:]
    assert seen == expected[:1]
