"""Sparse R-CNN's recipes have the published sizes and settings."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.config import instantiate

from focalnet_det.experiment import load_config
from tests.configs.test_leaves import groups
from tests.helpers.configs import build_without_memory, read
from tests.helpers.paths import CONFIGS

FOLDER = CONFIGS / "COCO-Detection"
# Published: 111.2 and 111 M; exact by the formulae of the layers, see below.
SIZES = {
    "sparse_rcnn_focalnet_tiny_lrf_fpn_3x": 111_215_864,
    "sparse_rcnn_focal_tiny_fpn_3x": None,
}


def head_parameters() -> int:
    """Proposals and six stages of the published sizes, layer by layer."""
    c, d, f, k, cells = 256, 64, 2048, 80, 49

    def linear(a: int, b: int) -> int:
        return a * b + b

    attention = linear(c, 3 * c) + linear(c, c)
    dynamic = linear(c, 2 * c * d) + 2 * d + 2 * c + linear(cells * c, c) + 2 * c
    feedforward = linear(c, f) + linear(f, c)
    hidden = 4 * (c * c + 2 * c)  # one layer for classes, three for boxes
    stage = attention + dynamic + feedforward + 3 * 2 * c + hidden + linear(c, k) + linear(c, 4)
    return 6 * stage + 300 * (4 + c)


@pytest.mark.parametrize("name", SIZES)
def test_recipe_is_as_published(name: str) -> None:
    experiment = read(FOLDER / f"{name}.py")
    model = build_without_memory(experiment.model)
    total = sum(p.numel() for p in model.parameters())
    backbone = sum(p.numel() for p in model.backbone.parameters())
    assert total - backbone == head_parameters()
    assert round(total / 1e6) == 111
    if SIZES[name]:
        assert total == SIZES[name]
        kernels = [
            [level[0].kernel_size[0] for level in stage.blocks[0].modulation.focal_layers]
            for stage in model.backbone.bottom_up.layers
        ]
        assert kernels == [[11, 13, 15], [9, 11, 13], [9, 11, 13], [7, 9, 11]]
    assert model.max_detections_per_image == 300
    assert model.head.box_pooler.level_poolers[0].sampling_ratio == 2
    assert tuple(model.criterion.weights) == (2, 5, 2)
    # One group: nothing is exempt from decay.
    ((kind, rate, decay, _, _),) = groups(experiment, model)
    assert (kind, rate, decay) == ("AdamW", 2.5e-5, 1e-4)
    assert experiment.options.clip_norm == 1
    assert experiment.options.precision == "fp32"
    assert (experiment.schedule.epochs, experiment.schedule.milestones) == (36, (27, 33))


def test_small_recipes_share_a_model() -> None:
    leaf = "sparse_rcnn_focalnet_nano_fpn_small.py"
    models = [
        load_config(CONFIGS / folder / leaf, ["model.num_classes=2"])
        for folder in ("COCO-Detection", "Shapes-Detection")
    ]
    assert models[0].model == models[1].model
    built = instantiate(models[0].model)
    assert built.init_proposal_boxes.weight.std(0)[:2].min() > 0, "a grid"
