"""The stored semantic case of the official head: its weights, inputs and outputs."""

from typing import Any

from detectron2.layers import ShapeSpec
from torch import Tensor

from focalnet_det.heads.mask2former.mask2former import build_parts
from tests.helpers import stored_outputs

CHANNELS = {"stage1": 96, "stage2": 192, "stage3": 384, "stage4": 768}
SIZES = ((32, 40), (16, 20), (8, 10), (4, 5))
NUM_CLASSES = 150
PADDED = (128, 160)


EMBEDDINGS = ("query_feat.weight", "query_embed.weight", "level_embed.weight", "level_embed")


def stored() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Numbers and arrays of the stored case; skips where they are absent."""
    return stored_outputs.stored("mask2former")


def input_shape() -> dict[str, ShapeSpec]:
    """Channels and strides of the features."""
    return {
        name: ShapeSpec(channels=width, stride=4 * 2**k)
        for k, (name, width) in enumerate(CHANNELS.items())
    }


def features() -> dict[str, Tensor]:
    """Features of two images of 128 x 160."""
    return {
        name: stored_outputs.random_map((2, width, *SIZES[i]), 11 + i)
        for i, (name, width) in enumerate(CHANNELS.items())
    }


def official_parts(**options: Any) -> dict[str, Any]:
    """Head with the weights of the case, and criterion."""
    numbers, _ = stored()
    parts = build_parts(input_shape(), num_classes=NUM_CLASSES, **options)
    prefix = "sem_seg_head."
    weights = stored_outputs.deterministic_weights(numbers["keys"], EMBEDDINGS)
    parts["sem_seg_head"].load_state_dict({k.removeprefix(prefix): v for k, v in weights.items()})
    return parts


def sampled(name: str, value: Tensor) -> tuple[Tensor, Tensor, float]:
    """Entries of a tensor that are stored, the stored ones, and the bar for their difference."""
    numbers, arrays = stored()
    expected = arrays[name].flatten()
    value = stored_outputs.sampled(name, value, expected)
    return value, expected, 20 * numbers["noise"][name][0]
