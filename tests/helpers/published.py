"""Names and shapes of the published files, written out by hand and filled with random numbers.

Written from the public model code, not from the tables under test.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from focalnet_det.backbones import FOCALNETS

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
NAMES = sorted(FOCALNETS)


def official_shapes(name: str, *, width: int | None = None, classes: int = 10) -> Shapes:
    """Names and shapes of the official classification code, in its order."""
    row = FOCALNETS[name]
    width = width or row.embed_dim
    stem = 7 if row.conv_embed else row.patch_size
    shapes: Shapes = {"patch_embed.proj.weight": (width, 3, stem, stem)}
    shapes |= {f"patch_embed.{n}": (width,) for n in ("proj.bias", "norm.weight", "norm.bias")}
    for i, depth in enumerate(row.depths):
        dim = width * 2**i
        for j in range(depth):
            shapes |= {
                f"layers.{i}.blocks.{j}.{part}": shape
                for part, shape in block_shapes(dim, row.focal_levels[i], row.focal_windows[i], row)
            }
        if i + 1 < len(row.depths):
            kernel = 3 if row.conv_embed else 2
            shapes[f"layers.{i}.downsample.proj.weight"] = (2 * dim, dim, kernel, kernel)
            for part in ("proj.bias", "norm.weight", "norm.bias"):
                shapes[f"layers.{i}.downsample.{part}"] = (2 * dim,)
    last = width * 2 ** (len(row.depths) - 1)
    shapes |= {"norm.weight": (last,), "norm.bias": (last,)}
    return shapes | {"head.weight": (classes, last), "head.bias": (classes,)}


def block_shapes(dim: int, levels: int, window: int, row: Any) -> list[tuple[str, Any]]:
    parts: list[tuple[str, Any]] = []
    if row.layer_scale is not None:
        parts += [("gamma_1", (dim,)), ("gamma_2", (dim,))]
    parts += [(f"norm1.{p}", (dim,)) for p in ("weight", "bias")]
    rows = 2 * dim + levels + 1
    parts += [("modulation.f.weight", (rows, dim)), ("modulation.f.bias", (rows,))]
    parts += [("modulation.h.weight", (dim, dim, 1, 1)), ("modulation.h.bias", (dim,))]
    parts += [("modulation.proj.weight", (dim, dim)), ("modulation.proj.bias", (dim,))]
    for k in range(levels):
        size = window + 2 * k
        parts.append((f"modulation.focal_layers.{k}.0.weight", (dim, 1, size, size)))
    if row.post_norm_in_modulation:
        parts += [("modulation.ln.weight", (dim,)), ("modulation.ln.bias", (dim,))]
    parts += [(f"norm2.{p}", (dim,)) for p in ("weight", "bias")]
    parts += [("mlp.fc1.weight", (4 * dim, dim)), ("mlp.fc1.bias", (4 * dim,))]
    return [*parts, ("mlp.fc2.weight", (dim, 4 * dim)), ("mlp.fc2.bias", (dim,))]


def official(name: str, *, width: int | None = 8, device: str = "cpu") -> State:
    """The official classification state dict of a variant; ``width`` None is the true one."""
    generator = None if device == "meta" else torch.Generator().manual_seed(0)
    return {
        n: torch.rand(shape, device=device, generator=generator)
        for n, shape in official_shapes(name, width=width).items()
    }


def is_post_norm(state: State) -> bool:
    return "layers.0.blocks.0.gamma_1" in state


def to_timm(state: State) -> State:
    post = is_post_norm(state)
    result = {}
    for name, tensor in state.items():
        name = name.replace("patch_embed", "stem").replace("modulation.ln", "modulation.norm")
        name = re.sub(r"^head\.", "head.fc.", name)
        name = re.sub(r"gamma_(\d)", r"ls\1.gamma", name)
        moved = re.match(r"layers\.(\d)\.downsample\.(.*)", name)
        if moved:
            name = f"layers.{int(moved[1]) + 1}.downsample.{moved[2]}"
        if post:
            name = re.sub(r"\.norm([12])\.", r".norm\1_post.", name)
        if re.search(r"(modulation\.(f|proj)|mlp\.fc\d)\.weight$", name):
            tensor = tensor[:, :, None, None]
        result[name] = tensor
    return result


def to_huggingface(state: State) -> State:
    result = {}
    for name, tensor in state.items():
        for old, new in (
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("patch_embed.norm", "embeddings.norm"),
            ("downsample.proj", "downsample.projection"),
            ("blocks", "layers"),
            ("modulation.f.", "modulation.projection_in."),
            ("modulation.h.", "modulation.projection_context."),
            ("modulation.proj.", "modulation.projection_out."),
            ("modulation.ln.", "modulation.layernorm."),
        ):
            name = name.replace(old, new)
        name = re.sub(r"^layers\.(\d)", r"encoder.stages.\1", name)
        name = re.sub(r"^norm\.", "layernorm.", name)
        head = name.startswith("head.")
        result[name.replace("head.", "classifier.") if head else f"focalnet.{name}"] = tensor
    return result


def to_mmpretrain(state: State) -> State:
    result = {}
    for name, tensor in state.items():
        if name.startswith("head."):
            result[name.replace("head.", "head.fc.")] = tensor
            continue
        name = re.sub(r"^(patch_embed|layers\.\d\.downsample)\.proj\.", r"\1.projection.", name)
        name = re.sub(r"\.norm([12])\.", r".ln\1.", name)
        name = re.sub(r"(focal_layers\.\d)\.0\.", r"\1.conv.", name)
        name = name.replace("mlp.fc1", "ffn.layers.0.0").replace("mlp.fc2", "ffn.layers.1")
        name = re.sub(r"gamma_(\d)", r"gamma\1.weight", name)
        result["backbone." + re.sub(r"^norm\.", "norm3.", name)] = tensor
    return result


def detector(prefix: str, *others: str) -> Callable[[State], State]:
    """The backbone of a detector: no classifier, an output norm per stage, other parts around."""

    def convert(state: State) -> State:
        result = {
            prefix + n: t
            for n, t in state.items()
            if not re.match(r"(norm|head)\.(weight|bias)", n)
        }
        for i in range(sum(f"layers.{i}.blocks.0.norm1.weight" in state for i in range(4))):
            like = state[f"layers.{i}.blocks.0.norm1.weight"]
            result |= {f"{prefix}norm{i}.{part}": like.clone() for part in ("weight", "bias")}
        return result | {name: torch.rand(4) for name in others}

    return convert


# Layout -> what makes its names out of the official ones.
LAYOUTS: dict[str, Callable[[State], State]] = {
    "official": dict,
    "timm": to_timm,
    "huggingface": to_huggingface,
    "mmpretrain": to_mmpretrain,
    "mmdet": detector("backbone.", "neck.fpn_convs.0.conv.weight", "rpn_head.rpn_cls.bias"),
    "mmseg": detector("backbone.", "decode_head.conv_seg.bias", "auxiliary_head.conv_seg.bias"),
    "focalnet_dino": detector(
        "backbone.0.", "transformer.level_embed", "bbox_embed.0.layers.0.bias"
    ),
    "detrex": detector("backbone.", "neck.convs.0.conv.weight", "transformer.level_embeds"),
    "xdecoder": detector("backbone.", "sem_seg_head.pixel_decoder.mask_features.bias"),
    "detectron2": detector("backbone.bottom_up.", "backbone.fpn_lateral2.bias", "pixel_mean"),
}
