"""Why a box was found: shares sum to 1, evidence to a derivative, and erasing changes both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from PIL import Image

from focalnet_det.predict.look_inside import main
from focalnet_det.predict.predictor import Predictor, to_picture
from focalnet_det.predict.why import modulation_of_image, plain_sample, why_box
from focalnet_det.visualization.draw_modulation import figure_picture
from focalnet_det.visualization.modulation_maps import find_focalnet

Train = Callable[[str], Path]


@pytest.fixture(scope="module")
def image(shapes: Path) -> Path:
    return sorted((shapes / "images/val").iterdir())[0]


def first_box(predictor: Predictor, image: Path) -> tuple[list[float], str]:
    prediction = predictor(image)
    return prediction.instances.pred_boxes.tensor[0].tolist(), prediction.names[0]


@pytest.mark.slow
def test_numbers_and_pictures_of_a_box(trained: Train, image: Path, tmp_path: Path) -> None:
    predictor = Predictor(trained("mask_rcnn"), device="cpu")
    box, name = first_box(predictor, image)
    explained = why_box(predictor, image, box, name)
    assert explained.title == f"{name} {predictor(image).instances.scores[0]:.0%}"
    assert [stage.stage for stage in explained.draws] == [f"stage{k}" for k in (1, 2, 3, 4)]
    assert explained.evidence is not None
    for stage in explained.draws:
        assert float(stage.levels.sum()) == pytest.approx(1, abs=1e-5)
        assert float(stage.places.sum()) == pytest.approx(1, abs=1e-5)
        assert 0 < stage.inside <= 1
        assert explained.evidence[stage.stage].shape == (3, *stage.places.shape)
    # Maps belong to the input of the network, 96 px for 80 px of the image.
    assert explained.image.shape[:2] == (96, 115)
    assert explained.scale == pytest.approx((115 / 96, 96 / 80))
    rows = explained.table().splitlines()
    assert len(rows) == 2 + 4 * 3
    assert figure_picture(explained.figure()).std() > 10

    # The object is painted over: the same box draws on other levels and places, and it is not
    # the same detection any more.
    pixels = np.array(to_picture(image))
    left, top, right, bottom = (round(x) for x in box)
    pixels[top:bottom, left:right] = 127
    erased = why_box(predictor, pixels, box, name)
    for first, second in zip(explained.draws, erased.draws, strict=True):
        assert (first.levels - second.levels).abs().max() > 1e-3
        assert (first.places - second.places).abs().max() > 1e-5

    anywhere = why_box(predictor, image, [3, 4, 20, 30])
    assert anywhere.evidence is None
    assert anywhere.title == "box 3, 4, 20, 30"
    assert len(anywhere.table().splitlines()[0]) < len(rows[0])


@pytest.mark.slow
def test_evidence_sums_to_the_derivative_by_the_gates(trained: Train, image: Path) -> None:
    """Central differences of the log-odds, with all gates of a stage scaled alike."""
    predictor = Predictor(trained("retinanet_with_views"), device="cpu")
    # One view alone is explained.
    with torch.no_grad():
        found = predictor.model([plain_sample(predictor, image)])[0]["instances"]
    box = found.pred_boxes.tensor[0].tolist()
    name = predictor.metadata.thing_classes[found.pred_classes[0]]
    evidence = why_box(predictor, image, box, name).evidence
    assert evidence is not None
    backbone: Any = find_focalnet(predictor.model)
    sample = plain_sample(predictor, image)
    cls = predictor.metadata.thing_classes.index(name)

    def log_odds(stage: int, factor: float) -> float:
        layers = [block.modulation.f for block in backbone.layers[stage].blocks]
        gates = backbone.layers[stage].blocks[0].modulation.focal_level + 1
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        before = [parameter.clone() for parameter in parameters]
        with torch.no_grad():
            for parameter in parameters:
                parameter[-gates:] *= factor
            found = predictor.model([sample])[0]["instances"]
            for parameter, values in zip(parameters, before, strict=True):
                parameter.copy_(values)
        distances = (found.pred_boxes.tensor - torch.tensor(box)).abs().sum(1)
        distances[found.pred_classes != cls] = np.inf
        return float(torch.logit(found.scores[distances.argmin()].double()))

    for stage, maps in enumerate(evidence.values()):
        step = 0.02
        slope = (log_odds(stage, 1 + step) - log_odds(stage, 1 - step)) / (2 * step)
        assert float(maps.sum()) == pytest.approx(slope, rel=0.03, abs=2e-4)


@pytest.mark.slow
def test_the_tool_draws_and_counts(
    trained: Train, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = str(trained("mask_rcnn")), tmp_path / "out" / "maps.png"
    main([run, str(image), "--output", str(output), "--device", "cpu"])
    printed = capsys.readouterr().out
    for part in ("stage1.", "global", "everywhere", "Receptive field of stage4", f"Saved {output}"):
        assert part in printed
    with Image.open(output) as picture:
        assert min(picture.size) > 500
    main([run, str(image), "--output", str(output), "--box", "0", "--threshold", "0.02"])
    assert "inside the box" in capsys.readouterr().out
    main(["focalnet_nano", str(image), "--output", str(output), "--at", "10,20", "--all-blocks"])
    assert "stage3.3" in capsys.readouterr().out
    for arguments, message in {
        (run, str(image), "--box", "99"): "--box 99: the model finds 0 objects",
        (run, str(image), "--region", "1,2,3"): "give 4 numbers",
        (run, str(image), "--weights", "x.pth"): "--weights is for a backbone",
        ("focalnet_nano", str(image), "--box", "0"): "needs a trained detector",
    }.items():
        with pytest.raises(ValueError, match=message):
            main([*arguments, "--output", str(output)])


@pytest.mark.slow
def test_maps_of_a_trained_model(trained: Train, image: Path) -> None:
    predictor = Predictor(trained("upernet"), device="cpu")
    inside = modulation_of_image(predictor, image, (20.0, 30.0))
    assert inside.image.shape[:2] == (96, 115)
    assert inside.point == pytest.approx((20 * 115 / 96, 30 * 96 / 80))
    for field in inside.fields.values():
        assert field.shape == (96, 115)
        assert float(field.sum()) == pytest.approx(1, abs=0.1)
    # The image of the picture is the one that the network sees.
    given = np.asarray(to_picture(image)).mean()
    assert inside.image.mean() == pytest.approx(given, abs=3)
