"""Look inside focal modulation: gates, modulators, kernels and receptive fields of a FocalNet.

Needs PyTorch alone. :mod:`.draw_modulation` draws what is computed here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.focalnet import FocalModulation, FocalNet
from ..ops import aggregate_contexts


@dataclass(frozen=True, kw_only=True)
class BlockMaps:
    """What one focal modulation computed for one image.

    Attributes:
        stage: "stage1" to "stage4".
        block: index in the stage.
        stride: side of a token, pixels of the network's input.
        gates: (L+1, H, W), unnormalized, any sign; the last one belongs to the global context.
        contributions: (L+1, H, W), L2 norm over the channels of each level's gated context, the
            summands of the aggregated context.
        modulator: (H, W), L2 norm over the channels.
        spread: for each of the L levels (k, k), how much each neighbor of a token contributes to
            its context, see :func:`effective_kernels`.
    """

    stage: str
    block: int
    stride: int
    gates: Tensor
    contributions: Tensor
    modulator: Tensor
    spread: Sequence[Tensor]


@dataclass(frozen=True)
class Recorded:
    """The input of one modulation, projected to query, context and gates.

    Attributes:
        stage, block: as in :class:`BlockMaps`.
        module: the modulation.
        projected: (N, H, W, 2 C + L + 1), with gradient where the call had one.
        valid: (N, 1, H, W), one inside an image; None for everywhere.
    """

    stage: str
    block: int
    module: FocalModulation
    projected: Tensor
    valid: Tensor | None

    def gates(self, values: Tensor | None = None) -> Tensor:
        """Return the gates of the first image, (L+1, H, W), or those of a gradient."""
        rows = self.projected if values is None else values
        return rows[0, ..., -(self.module.focal_level + 1) :].permute(2, 0, 1)


def find_focalnet(model: nn.Module) -> FocalNet:
    """Return the FocalNet in a model.

    Raises: ValueError if there is none.
    """
    for module in model.modules():
        if isinstance(module, FocalNet):
            return module
    backbone = getattr(model, "backbone", model)
    inner = getattr(backbone, "bottom_up", backbone)
    raise ValueError(
        f"The backbone is {type(inner).__name__}, but focal modulation is what FocalNet computes: "
        "give a model with a FocalNet backbone."
    )


@contextmanager
def recorded_modulations(backbone: FocalNet) -> Iterator[list[Recorded]]:
    """Record every modulation of the calls within the block, in order of the network.

    Blocks with hooks run on the reference backend, whatever is chosen otherwise.
    """
    records: list[Recorded] = []
    with ExitStack() as stack:
        layer: Any
        for stage, layer in zip(backbone.stage_names, backbone.layers, strict=True):
            # Recomputed blocks would record tensors that the result does not depend on.
            stack.callback(
                setattr, layer, "activation_checkpointing", layer.activation_checkpointing
            )
            layer.activation_checkpointing = False
            for number, block in enumerate(layer.blocks):
                for handle in _record(block.modulation, records, stage, number):
                    stack.callback(handle.remove)
        yield records


def _record(
    module: FocalModulation, records: list[Recorded], stage: str, block: int
) -> Iterator[Any]:
    valid: list[Tensor | None] = [None]

    def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        valid[0] = arguments[1] if len(arguments) > 1 else None

    def after(_: nn.Module, __: Any, projected: Tensor) -> None:
        records.append(Recorded(stage, block, module, projected, valid[0]))

    yield module.register_forward_pre_hook(before)
    yield module.f.register_forward_hook(after)


def modulation_maps(model: nn.Module, call: Callable[[], Any]) -> list[BlockMaps]:
    """Compute the maps of every block for the first image of a call.

    Example::

        maps = modulation_maps(net, lambda: net(images))

    Args:
        model: a FocalNet, or a model with one.
        call: runs the model; of several calls of the backbone the first counts.
    Raises: ValueError if the model has no FocalNet.
    """
    backbone = find_focalnet(model)
    with torch.no_grad(), recorded_modulations(backbone) as records:
        call()
    strides = {name: shape.stride for name, shape in backbone.shapes.items()}
    first = {(r.stage, r.block): r for r in reversed(records)}
    return [block_maps(record, strides[record.stage]) for record in reversed(first.values())]


@torch.no_grad()
def block_maps(record: Recorded, stride: int) -> BlockMaps:
    """Compute the maps of one block for the first image of a call."""
    module = record.module
    rows = record.projected[:1].float().permute(0, 3, 1, 2)
    _, context, gates = rows.split((module.dim, module.dim, module.focal_level + 1), dim=1)
    kernels = [kernel.float() for kernel in module.focal_layers.parameters()]
    valid = None if record.valid is None else record.valid[:1].float()

    def aggregate(chosen: Tensor) -> Tensor:
        normalize = module.normalize_modulator
        return aggregate_contexts(context, chosen, kernels, normalize=normalize, valid=valid)

    # The aggregated context is linear in the gates: with one gate alone it is that level's part.
    levels = torch.eye(gates.shape[1], device=gates.device)[:, :, None, None]
    parts = [aggregate(gates * level) for level in levels]
    bias = None if module.h.bias is None else module.h.bias.float()
    modulator = F.conv2d(torch.stack(parts).sum(0), module.h.weight.float(), bias)
    contributions = torch.stack([part[0].norm(dim=0) for part in parts])
    if valid is not None:
        # The global context has a gate in the padding, too, where nobody reads it.
        contributions = contributions * valid[0]
    return BlockMaps(
        stage=record.stage,
        block=record.block,
        stride=stride,
        gates=gates[0].cpu(),
        contributions=contributions.cpu(),
        modulator=modulator[0].norm(dim=0).cpu(),
        spread=[kernel.cpu() for kernel in effective_kernels(module)],
    )


@torch.no_grad()
def effective_kernels(module: FocalModulation) -> list[Tensor]:
    """Compute how much each neighbor of a token contributes to its context at each level.

    Level l convolves level l - 1, so that its kernel is the convolution of the first l kernels. The
    activations between them are left out, and magnitudes are averaged over the channels.

    Returns: for each level (r, r) that sums to 1, with r = 1 + sum of (kernel size - 1).
    """
    composed: list[Tensor] = []
    for weight in module.focal_layers.parameters():
        kernel = weight.abs().float()
        if composed:
            channels, size = kernel.shape[0], kernel.shape[-1]
            flipped = kernel.flip((2, 3))
            kernel = F.conv2d(
                composed[-1].transpose(0, 1), flipped, padding=size - 1, groups=channels
            ).transpose(0, 1)
        composed.append(kernel)
    return [_normalized(kernel.mean((0, 1))) for kernel in composed]


def _normalized(kernel: Tensor) -> Tensor:
    if kernel.sum() > 0:
        return kernel / kernel.sum()
    middle = torch.zeros_like(kernel)
    middle[kernel.shape[0] // 2, kernel.shape[1] // 2] = 1
    return middle


def reaches(module: FocalModulation) -> list[int]:
    """Return the side of the neighborhood of each level, tokens."""
    return [1 + total for total in accumulate(size - 1 for size in module.focal_windows)]


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Which levels and places the modulations of a stage draw on for the tokens of a box.

    Attributes:
        stage, stride: as in :class:`BlockMaps`.
        levels: (L+1,), sums to 1, the global context last.
        places: (H, W), sums to 1.
        inside: part of ``places`` that lies in the box, 0..1.
    """

    stage: str
    stride: int
    levels: Tensor
    places: Tensor
    inside: float


def draws_of_box(maps: Sequence[BlockMaps], box: Sequence[float]) -> list[Draws]:
    """Compute which levels and places each stage draws on for a box.

    In each block, the share of a level is the magnitude of its gated context, summed over the
    tokens of the box, over that of all levels. A level's share comes from the places that its
    kernels reach, weighted as :func:`effective_kernels` says within the map, and the share of the
    global context from everywhere alike. Shares of a stage are the means of those of its blocks.

    Args:
        maps: of an image.
        box: xyxy, pixels of the network's input; tokens count by the part of them in the box.
    Raises: ValueError if the box contains no token or nothing is drawn on.
    """
    stages = list(dict.fromkeys(block.stage for block in maps))
    result = []
    for stage in stages:
        blocks = [block for block in maps if block.stage == stage]
        size = blocks[0].modulator.shape
        covered = coverage(box, blocks[0].stride, (size[0], size[1]))
        parts = [_block_draws(block, covered) for block in blocks]
        places = torch.stack([p for _, p in parts]).mean(0)
        result.append(
            Draws(
                stage=stage,
                stride=blocks[0].stride,
                levels=torch.stack([levels for levels, _ in parts]).mean(0),
                places=places,
                inside=float((places * covered).sum()),
            )
        )
    return result


def coverage(box: Sequence[float], stride: int, size: tuple[int, int]) -> Tensor:
    """Return the part of each token that lies in a box, 0..1, (H, W).

    Args:
        box: xyxy, pixels.
        stride: side of a token, pixels.
        size: height and width of the map, tokens.
    """
    sides = []
    for count, first, last in ((size[0], box[1], box[3]), (size[1], box[0], box[2])):
        starts = torch.arange(count, dtype=torch.float64) * stride
        overlap = (starts + stride).clamp(max=last) - starts.clamp(min=first)
        sides.append(overlap.clamp(min=0) / stride)
    return torch.outer(*sides).float()


def _block_draws(block: BlockMaps, covered: Tensor) -> tuple[Tensor, Tensor]:
    """Return shares of the levels, (L+1,), and of the places, (H, W), each with sum 1."""
    used = block.contributions * covered
    total = used.sum()
    if not total > 0:
        raise ValueError(
            "The box draws on nothing: it lies outside of the image, or all gates are 0 there."
        )
    used = used / total
    places = torch.full_like(covered, float(used[-1].sum()) / covered.numel())
    for level, kernel in zip(used, block.spread, strict=False):
        places += _spread(level, kernel)
    return used.sum((1, 2)), places


def _spread(weights: Tensor, kernel: Tensor) -> Tensor:
    """Distribute the weight of each token, (H, W), over its neighbors within the map."""
    taps, padding = kernel[None, None], kernel.shape[0] // 2
    within = F.conv2d(torch.ones_like(weights)[None, None], taps, padding=padding)
    # A kernel whose weights all lie outside leaves the weight where it is.
    lost = torch.where(within[0, 0] > 0, 0.0, weights)
    scaled = torch.where(within > 0, weights / within.clamp(min=1e-12), 0.0)
    return F.conv_transpose2d(scaled, taps, padding=padding)[0, 0] + lost


def receptive_field(
    backbone: Any, images: Tensor, stage: str, point: tuple[float, float]
) -> Tensor:
    """Compute the effective receptive field of one token of an image.

    It is the magnitude of the gradient of the token's features, summed over their channels, with
    respect to the pixels.

    Args:
        backbone: a FocalNet or another backbone with the same outputs.
        images: (1, C, H, W), normalized.
        stage: name of an output.
        point: x and y, pixels of ``images``; the token that contains it is taken.
    Returns: (H, W), sums to 1.
    Raises: ValueError if the point lies outside of the image, or the backbone has no such output.
    Source: arXiv:1701.04128, section 3.
    """
    height, width = images.shape[-2:]
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        raise ValueError(f"Point {point} lies outside of the image of {width} x {height} px.")
    pixels = images.detach().clone().requires_grad_()
    sizes = [(height, width)] if getattr(backbone, "valid_context", False) else None
    with torch.enable_grad():
        features = backbone(pixels, sizes) if sizes else backbone(pixels)
        if stage not in features:
            raise ValueError(f"The backbone returns {', '.join(features)}, not {stage!r}.")
        stride = backbone.output_shape()[stage].stride
        token = features[stage][0, :, int(point[1] // stride), int(point[0] // stride)]
        (gradient,) = torch.autograd.grad(token.sum(), pixels)
    field = gradient[0].abs().sum(0)
    return field / field.sum().clamp(min=torch.finfo(field.dtype).tiny)


def field_side(field: Tensor, point: tuple[float, float], share: float) -> int:
    """Return the side of the smallest square around a point that holds a share of a field, pixels.

    Args:
        field: (H, W), sums to 1.
        point: x and y of the middle, pixels.
        share: 0..1.
    """
    ys = (torch.arange(field.shape[0]) + 0.5 - point[1]).abs()
    xs = (torch.arange(field.shape[1]) + 0.5 - point[0]).abs()
    distance = torch.maximum(ys[:, None], xs).flatten()
    order = distance.argsort()
    held = field.cpu().flatten()[order].cumsum(0)
    index = int((held < share).sum().clamp(max=len(order) - 1))
    return round(2 * float(distance[order[index]]))
