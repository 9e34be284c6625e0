"""Names of Swin Transformers and ResNets in public files, and here: torchvision's and Detectron2's.

Torchvision's Swin is used here as it is. The official code, Detectron2's main branch and timm have
one set of names for it, mmdet's family another; timm counts a downsampling with the stage after it.
Sources: pytorch/vision:torchvision/models/swin_transformer.py, microsoft/Swin-Transformer:models,
huggingface/pytorch-image-models:timm/models/swin_transformer.py,
open-mmlab/mmdetection:mmdet/models/backbones/swin.py, facebookresearch/detectron2:tools.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .focal_transformer_names import SIGN as FOCAL_SIGN
from .translate import Translation

# What may stand before the names of a backbone; the longest that fits is taken off.
PREFIXES = (
    *("backbone.bottom_up.", "backbone.0.body.", "backbone.0.", "backbone.body.", "backbone."),
    *("encoder.", ""),
)
SWIN_SIGN = "relative_position_bias_table"
RESNET_SIGN = re.compile(r"(^|\.)(layer|res)[2-4]\.\d+\.conv1\.weight$|^res[2-5]_\d+_branch2a_w$")
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
# Present in some files, and the same in every network of these sizes.
CONSTANT = re.compile(r"\.relative_position_index$")
DROPS = (
    (CLASSIFIERS, "classifier"),
    (re.compile(r"\.num_batches_tracked$"), "counter of batch norms, which are constant here"),
    (re.compile(r"\.attn_mask$"), "mask of shifted windows, which is computed here"),
)
# Of ImageNet's red, green and blue, 0..255: the files of MSRA and Detectron have none.
STD = (58.395, 57.12, 57.375)
EPS = 1e-5
# Norm and linear layer of Swin's merging of patches.
MERGING = re.compile(r"features\.\d+\.(reduction|norm)\.")


def find_family(names: Iterable[str]) -> str | None:
    """Return "swin" or "resnet" if names of a model are of one, with any prefix; else None."""
    names = list(names)
    # Focal Transformers name their tables as Swin does.
    focal = any(FOCAL_SIGN in name for name in names)
    if not focal and any(name.endswith(SWIN_SIGN) for name in names):
        return "swin"
    return "resnet" if any(RESNET_SIGN.search(name) for name in names) else None


def translate_peer(tensors: Mapping[str, Tensor]) -> Translation | None:
    """Bring the backbone of a file to the names of ``focalnet_det.backbones.peers``.

    Args:
        tensors: a classifier, a backbone or a whole detector, without containers.
    Returns: as :func:`~focalnet_det.checkpoint.layouts.translate.translate`; None for others.
    """
    family = find_family(tensors)
    if family is None:
        return None
    sign = SWIN_SIGN if family == "swin" else RESNET_SIGN
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
    """Bring a tensor to the order that it has here; shapes of other networks stay as they are."""
    if CONSTANT.search(ours):
        return tensor.reshape(-1)
    if layout == "mmdet" and MERGING.match(ours) and tensor.shape[-1] % 4 == 0:
        # mmdet gathers the four pixels of a patch by nn.Unfold: row by row within each channel.
        pixels = tensor.unflatten(-1, (-1, 4)).transpose(-1, -2)[..., [0, 2, 1, 3], :]
        return pixels.flatten(-2).contiguous()
    if layout == "caffe2" and ours == "stem.conv1.weight" and tensor.shape[1:2] == (3,):
        # Blue, green and red of deviation 1, against red, green and blue of ImageNet's.
        return tensor.flip(1) * tensor.new_tensor(STD)[:, None, None]
    return tensor


def _fill_folded_norms(backbone: dict[str, Tensor]) -> None:
    """Give norms without statistics those that change nothing: theirs are in scale and shift."""
    for name in [n for n in backbone if n.endswith(".norm.weight")]:
        module, scale = name.removesuffix("weight"), backbone[name]
        backbone.setdefault(f"{module}running_mean", torch.zeros_like(scale))
        backbone.setdefault(f"{module}running_var", torch.full_like(scale, 1 - EPS))


def other_constants(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    """Return a problem for each tensor of a file that a network has fixed to other values."""
    names = [name for name in tensors if CONSTANT.search(name) and name in target]
    return [
        f"{name} is of windows in another order"
        for name in names
        if tensors[name].shape == target[name].shape and not tensors[name].equal(target[name])
    ]


def peer_notes(layout: str, net: nn.Module) -> list[str]:
    """Return what loading such a file into a network means beyond its names."""
    if layout != "caffe2":
        return []
    notes = ["The first convolution was changed from BGR with deviation 1 to RGB with ImageNet's."]
    strides = [m.stride for n, m in net.named_modules() if n == "res3.0.conv1"]
    if strides and strides[0] in ((1, 1), 1):
        notes.append(
            "These weights were trained with the stride in the 1x1 convolutions, the network has "
            "it in the 3x3: features differ. Prefer torchvision's weights, or build the ResNet "
            "with stride_in_1x1=True."
        )
    return notes
