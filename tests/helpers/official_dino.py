"""The stored case of the official DINO: its weights, inputs and outputs."""

from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor

from focalnet_det.heads.dino import DINO, dino
from focalnet_det.heads.set_prediction.levels import padding_masks
from tests.helpers import stored_outputs

EMBEDDINGS = ("level_embed", "tgt_embed.weight", "label_enc.weight")


def case() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Numbers of the case of four scales, and all stored arrays."""
    numbers, arrays = stored_outputs.stored("dino")
    return numbers["s4"], arrays


def noise(name: str) -> float:
    """Largest difference of the official float32 from its float64."""
    return float(stored_outputs.stored("dino")[0]["noise"][name][0])


class StoredFeatures(Backbone):
    """The features of the case, whatever the images."""

    def forward(self, _: Tensor) -> dict[str, Tensor]:
        return features()

    def output_shape(self) -> dict[str, ShapeSpec]:
        numbers, _ = case()
        return {
            f"stage{i + 2}": ShapeSpec(channels=width, stride=8 * 2**i)
            for i, width in enumerate(numbers["channels"])
        }


def features() -> dict[str, Tensor]:
    numbers, _ = case()
    return {
        f"stage{i + 2}": stored_outputs.random_map(
            (numbers["batch"], width, *numbers["feature_sizes"][i]), numbers["feature_seed0"] + i
        )
        for i, width in enumerate(numbers["channels"])
    }


def padding() -> Tensor:
    numbers, _ = case()
    sizes = [(height, width) for height, width in numbers["valid"]]
    return padding_masks(sizes, tuple(numbers["padded"]), torch.device("cpu"))


def official_weights() -> dict[str, Tensor]:
    """The weights by their official names, each once."""
    weights = stored_outputs.deterministic_weights(case()[0]["keys"], EMBEDDINGS)
    for name in ("class_embed.0.bias", "transformer.enc_out_class_embed.bias"):
        weights[name] -= 4.6
    return weights


def official_model(**options: Any) -> DINO:
    """The model with the weights of the case, of the conventions of its code."""
    model = dino(
        backbone=StoredFeatures(),
        num_classes=80,
        queries=100,
        conventions="focalnet_dino",
        **options,
    )
    missing, unexpected = model.load_state_dict(official_weights(), strict=False)
    assert missing == ["position_temperature"]
    assert not unexpected
    return model.eval()
