"""Translate names of Swin Transformers and ResNets to those of torchvision and Detectron2.

This package uses torchvision's Swin. The official code, Detectron2's main branch and timm have one
set of names for it, mmdet's family another; timm counts a downsampling as part of the next stage.
Sources: pytorch/vision:torchvision/models/swin_transformer.py, microsoft/Swin-Transformer:models,
huggingface/pytorch-image-models:timm/models/swin_transformer.py,
open-mmlab/mmdetection:mmdet/models/backbones/swin.py, facebookresearch/detectron2:tools.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .focal_transformer_names import MARKER as FOCAL_MARKER
from .translate import Translation

# Prefixes of the backbone; the first match is removed, so longer ones come first.
PREFIXES = (
    *("backbone.bottom_up.", "backbone.0.body.", "backbone.0.", "backbone.body.", "backbone."),
    *("encoder.", ""),
)
SWIN_MARKER = "relative_position_bias_table"
RESNET_MARKER = re.compile(r"(^|\.)(layer|res)[2-4]\.\d+\.conv1\.weight$|^res[2-5]_\d+_branch2a_w$")
SWIN_INNER = {
    "attn.w_msa.": "attn.",
    "ffn.layers.0.0.": "mlp.0.",
    "ffn.layers.1.": "mlp.3.",
    "mlp.fc1.": "mlp.0.",
    "mlp.fc2.": "mlp.3.",
}
RESNET_INNER = (
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)
CLASSIFIERS = re.compile(r"^(head|fc|head\.fc|linear|pred)[._](weight|bias|w|b)$")
# Buffers that only some files have, and that are equal in every network of these sizes.
CONSTANT = re.compile(r"\.relative_position_index$")
DROPS = (
    (CLASSIFIERS, "classifier"),
    (re.compile(r"\.num_batches_tracked$"), "counter of batch norms, which are frozen"),
    (re.compile(r"\.attn_mask$"), "mask of shifted windows, which is computed"),
)
# Standard deviation of ImageNet, RGB, 0..255; the files of MSRA and Detectron do not divide by it.
STD = (58.395, 57.12, 57.375)
EPS = 1e-5
# Norm and linear layer of Swin's patch merging.
MERGING = re.compile(r"features\.\d+\.(reduction|norm)\.")


def find_peer_family(names: Iterable[str]) -> str | None:
    """Return "swin" or "resnet" if a model has such a backbone, with any prefix; else None."""
    names = list(names)
    # Focal Transformers have bias tables of the same name as Swin.
    focal = any(FOCAL_MARKER in name for name in names)
    if not focal and any(name.endswith(SWIN_MARKER) for name in names):
        return "swin"
    return "resnet" if any(RESNET_MARKER.search(name) for name in names) else None


def translate_peer(tensors: Mapping[str, Tensor]) -> Translation | None:
    """Translate the backbone of a file to the names of ``focalnet_det.backbones.peers``.

    Args:
        tensors: state dict of a classifier, a backbone or a whole detector, without containers.
    Returns: as :func:`~focalnet_det.checkpoint.layouts.translate.translate`; None if the backbone
        is neither Swin nor ResNet.
    """
    family = find_peer_family(tensors)
    if family is None:
        return None
    sign = SWIN_MARKER if family == "swin" else RESNET_MARKER
    first = next(n for n in tensors if re.search(sign, n))
    prefix = next(p for p in PREFIXES if first.startswith(p))
    inside = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    layout, names = (_swin_names if family == "swin" else _resnet_names)(list(inside))
    result = Translation(layout, prefix)
    result.others = {n: t for n, t in tensors.items() if not n.startswith(prefix)}
    for theirs, ours in names.items():
        full = prefix + theirs
        rule = next((rule for pattern, rule in DROPS if pattern.search(theirs)), None)
        if rule is not None:
            result.dropped[full] = rule
            continue
        result.backbone[ours] = _converted(ours, inside[theirs], layout)
        if ours != full:
            result.renamed[ours] = full
    if layout == "caffe2":
        _fill_folded_norms(result.backbone)
    return result


def _swin_names(names: list[str]) -> tuple[str, dict[str, str]]:
    if any(name.startswith("features.") for name in names):
        return "torchvision", {name: name for name in names}
    mmdet = any(name.startswith("stages.") for name in names)
    # The official code downsamples at the end of a stage, timm at the start of the next one.
    late = not any(re.match(r"(layers|stages)[._]0\.downsample\.", name) for name in names)
    layout = "mmdet" if mmdet else "timm" if late else "official"
    return layout, {name: _swin_name(name, late) for name in names}


def _swin_name(name: str, late: bool) -> str:
    stem = re.match(r"patch_embed\.(proj(?:ection)?|norm)\.", name)
    if stem is not None:
        return f"features.0.{2 if stem[1] == 'norm' else 0}.{name[stem.end() :]}"
    stage = re.match(r"(?:layers|stages)[._](\d+)\.(?:blocks\.(\d+)|downsample)\.", name)
    if stage is None:
        return name
    inner = name[stage.end() :]
    if stage[2] is None:
        return f"features.{2 * int(stage[1]) + (0 if late else 2)}.{inner}"
    for theirs, ours in SWIN_INNER.items():
        if inner.startswith(theirs):
            inner = ours + inner.removeprefix(theirs)
    return f"features.{2 * int(stage[1]) + 1}.{stage[2]}.{inner}"


def _resnet_names(names: list[str]) -> tuple[str, dict[str, str]]:
    if any(name.endswith("_branch2a_w") for name in names):
        from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names

        return "caffe2", dict(zip(names, convert_basic_c2_names(names), strict=True))
    if any(name.startswith("stem.conv1.") for name in names):
        return "detectron2", {name: name for name in names}
    result = {}
    for name in names:
        ours = re.sub(r"^layer(\d)\.", lambda m: f"res{int(m[1]) + 1}.", name)
        for pattern, replacement in RESNET_INNER:
            ours = re.sub(pattern, replacement, ours)
        result[name] = ours
    return "torchvision", result


def _converted(ours: str, tensor: Tensor, layout: str) -> Tensor:
    """Reorder a tensor as torchvision or Detectron2 stores it; leave other shapes unchanged."""
    if CONSTANT.search(ours):
        return tensor.reshape(-1)
    if layout == "mmdet" and MERGING.match(ours) and tensor.shape[-1] % 4 == 0:
        # mmdet gathers the four pixels of a patch with nn.Unfold: row by row within each channel.
        pixels = tensor.unflatten(-1, (-1, 4)).transpose(-1, -2)[..., [0, 2, 1, 3], :]
        return pixels.flatten(-2).contiguous()
    if layout == "caffe2" and ours == "stem.conv1.weight" and tensor.shape[1:2] == (3,):
        # BGR images with a standard deviation of 1 to RGB images with that of ImageNet.
        return tensor.flip(1) * tensor.new_tensor(STD)[:, None, None]
    return tensor


def _fill_folded_norms(backbone: dict[str, Tensor]) -> None:
    """Add neutral statistics to norms without any: theirs are folded into scale and shift."""
    for name in [n for n in backbone if n.endswith(".norm.weight")]:
        module, scale = name.removesuffix("weight"), backbone[name]
        backbone.setdefault(f"{module}running_mean", torch.zeros_like(scale))
        backbone.setdefault(f"{module}running_var", torch.full_like(scale, 1 - EPS))


def constant_problems(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Return a problem for each constant buffer that differs between a file and a network."""
    names = [name for name in tensors if CONSTANT.search(name) and name in target]
    return [
        f"{name} is for another order of the tokens in a window"
        for name in names
        if tensors[name].shape == target[name].shape and not tensors[name].equal(target[name])
    ]


def peer_notes(layout: str, net: nn.Module) -> list[str]:
    """Return notes for the load report of a Swin or ResNet that has just been loaded."""
    if layout != "caffe2":
        return []
    notes = [
        "The first convolution was converted from BGR images with a standard deviation of 1 to RGB "
        "images with that of ImageNet."
    ]
    strides = [m.stride for n, m in net.named_modules() if n == "res3.0.conv1"]
    if strides and strides[0] in ((1, 1), 1):
        notes.append(
            "These weights were trained with strides in the 1x1 convolutions, but the network has "
            "them in the 3x3 convolutions: features differ. Use torchvision's weights, or build "
            "the ResNet with stride_in_1x1=True."
        )
    return notes
