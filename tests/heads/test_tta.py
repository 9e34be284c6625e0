"""Test-time augmentation: what it merges, and that one plain view changes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.evaluation import inference_context

from focalnet_det.data.augmentation import evaluation_resize, multiscale_or_crop, scaled
from focalnet_det.data.loader import build_test_loader
from focalnet_det.heads.tta import TestTimeAugmentation
from tests.helpers.small_segmentor import small

NAME = "test_tta_images"
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    records = []
    for index, size in enumerate([(60, 80), (90, 70)]):
        path = tmp_path / f"{index}.png"
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        records.append({"file_name": str(path), "image_id": index})
    DatasetCatalog.register(NAME, lambda: records)
    yield tmp_path
    DatasetCatalog.remove(NAME)


def loader(**options: object) -> object:
    resize = evaluation_resize(short_side=64, max_long_side=256)
    return build_test_loader(dataset=NAME, augmentations=resize, num_workers=0, **options)


def answers(model: nn.Module, **options: object) -> list[Tensor]:
    with torch.no_grad():
        return [model(batch)[0]["sem_seg"] for batch in loader(**options)]


def test_one_scale_without_flip_is_plain_inference(folder: Path) -> None:
    model = small()
    model.sem_seg_head.conv_seg.weight.data *= 100
    plain = answers(model)
    augmented = answers(TestTimeAugmentation(model), scales=(1.0,))
    for a, b in zip(augmented, plain, strict=True):
        torch.testing.assert_close(a, b.softmax(0), rtol=0, atol=0)
        assert torch.equal(a.argmax(0), b.argmax(0))
    for a, b in zip(answers(TestTimeAugmentation(model)), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_all_views_are_averaged(folder: Path) -> None:
    model = small()
    model.sem_seg_head.conv_seg.weight.data *= 100
    augmented = answers(TestTimeAugmentation(model), scales=SCALES, flip=True)
    for index, result in enumerate(augmented):
        image = np.asarray(Image.open(folder / f"{index}.png"))
        expected, sizes = [], set()
        for scale in SCALES:
            resize = T.ResizeShortestEdge(round(64 * scale), round(256 * scale))
            for mirror in (False, True):
                view = resize.get_transform(image).apply_image(image)
                sizes.add(view.shape[:2])
                view = view[:, ::-1] if mirror else view
                tensor = torch.as_tensor(np.ascontiguousarray(view.transpose(2, 0, 1)))
                record = {"image": tensor, "height": image.shape[0], "width": image.shape[1]}
                with torch.no_grad():
                    logits = model([record])[0]["sem_seg"].numpy()
                logits = logits[..., ::-1] if mirror else logits
                powers = np.exp(logits - logits.max(0))
                expected.append(powers / powers.sum(0))
        assert len(sizes) == 6
        np.testing.assert_allclose(result.numpy(), np.mean(expected, axis=0), rtol=1e-4, atol=1e-6)
        assert np.std(expected, axis=0).max() > 1e-3


def test_a_model_that_mirrors_is_not_changed_by_flips(folder: Path) -> None:
    class Brightness(nn.Module):
        """Logits that move with the image."""

        def forward(self, x: list[dict]) -> list[dict]:
            resize = (x[0]["height"], x[0]["width"])
            grey = x[0]["image"].float().mean(0, keepdim=True)[None] / 50
            grey = nn.functional.interpolate(grey, resize, mode="bilinear")[0]
            return [{"sem_seg": torch.cat([grey, -grey])}]

    plain = answers(TestTimeAugmentation(Brightness()), scales=(1.0,))
    flipped = answers(TestTimeAugmentation(Brightness()), scales=(1.0,), flip=True)
    for a, b in zip(plain, flipped, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_answers_without_a_rule_are_an_error(folder: Path) -> None:
    class Depth(nn.Module):
        def forward(self, x: list[dict]) -> list[dict]:
            return [{"depth": None}]

    known = "Known: sem_seg, instances, panoptic_seg"
    with pytest.raises(KeyError, match=f"cannot merge 'depth'. {known}"):
        list(map(TestTimeAugmentation(Depth()), loader(flip=True)))


def test_only_the_resize_of_evaluation_is_scaled() -> None:
    (resize,) = scaled(evaluation_resize(short_side=512, max_long_side=2048), 1.75)
    assert (resize.short_edge_length, resize.max_size) == ((896, 896), 3584)
    with pytest.raises(ValueError, match="RandomFlip"):
        scaled(multiscale_or_crop(), 0.5)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_put_back(training: bool) -> None:
    model = small().train(training)
    with inference_context(TestTimeAugmentation(model)):
        assert not model.sem_seg_head.training
    assert model.sem_seg_head.training == model.training == training
