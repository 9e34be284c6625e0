"""Define what all backbones share: stem, stages of blocks, downsampling, output norms."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import PatchEmbed, channels_first, layer_norm, valid_mask
from .freezing import freeze, keep_frozen_in_eval


@dataclass(frozen=True)
class FeatureShape:
    """Channels and stride (pixels) of an output feature, like Detectron2's ShapeSpec."""

    channels: int
    stride: int


# Builds a block from the index of its stage, its channels and its drop path rate.
MakeBlock = Callable[[int, int, float], nn.Module]


class Stage(nn.Module):
    """Blocks at one resolution, and the downsampling after them.

    Args:
        blocks: blocks that map (N, H, W, C) to (N, H, W, C).
        downsample: patch embedding after the blocks, None in the last stage.
        activation_checkpointing: recompute blocks in the backward pass to save memory.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        downsample: PatchEmbed | None,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.activation_checkpointing = activation_checkpointing

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Apply the blocks, (N, H, W, C) -> (N, H, W, C); the backbone calls ``downsample``.

        ``valid`` is (N, 1, H, W), one inside an image and zero in the batch padding.
        """
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, valid, use_reentrant=False)
            else:
                x = block(x, valid)
        return x


class StagedBackbone(nn.Module):
    """Backbone of stages: an image batch in, a dict of feature maps out.

    Features are named ``stage1`` .. ``stage4``, where ``stageK`` has stride ``2**(K+1)``. Any image
    size works: maps are zero-padded at the right and bottom where a stride does not divide their
    sides. Parameter names are those of the official classification code.

    Args:
        make_block: see ``MakeBlock``; blocks map (N, H, W, C) and ``valid`` to (N, H, W, C).
        in_channels: image channels.
        embed_dim: channels of the first stage; each further stage doubles them.
        depths: number of blocks of each stage.
        conv_embed: overlapping stem and downsampling (7x7 and 3x3) instead of 4x4 and 2x2.
        drop_rate: dropout probability of the embedding.
        drop_path_rate: stochastic depth probability of the last block; it increases linearly from
            0 at the first block.
        out_features: names of the features to return, None for all; later stages that no feature
            needs are not built.
        output_norm: LayerNorm ``norm{i}`` on each output, as in the official detection code.
        frozen_stages: None freezes nothing, 0 the stem, k the stem and ``layers[0..k-1]`` (with
            their downsampling). Frozen modules stay in eval mode. Output norms are never frozen:
            no published file contains them.
        activation_checkpointing: recompute each block in the backward pass to save memory.
        valid_context: accept ``image_sizes`` in :meth:`forward`, and make features independent of
            batch padding. Published results do not use it.
        patch_size: stride of the stem, pixels.
        stem_padding: padding of the ``conv_embed`` stem, pixels.
    Raises: ValueError for inconsistent arguments.
    """

    def __init__(
        self,
        make_block: MakeBlock,
        *,
        in_channels: int,
        embed_dim: int,
        depths: Sequence[int],
        conv_embed: bool,
        drop_rate: float,
        drop_path_rate: float,
        out_features: Sequence[str] | None,
        output_norm: bool,
        frozen_stages: int | None,
        activation_checkpointing: bool,
        valid_context: bool,
        patch_size: int,
        stem_padding: int,
    ) -> None:
        super().__init__()
        names = feature_names(len(depths), patch_size)
        self.out_features = _check_out_features(out_features, names)
        built = max(names.index(name) for name in self.out_features) + 1
        self.stage_names = names[:built]
        self.valid_context = valid_context
        self.shapes = {
            name: FeatureShape(channels=embed_dim * 2**i, stride=patch_size * 2**i)
            for i, name in enumerate(self.stage_names)
        }
        self.patch_embed = PatchEmbed(
            in_channels,
            embed_dim,
            stride=patch_size,
            overlap_kernel=7 if conv_embed else None,
            overlap_padding=stem_padding,
        )
        self.pos_drop = nn.Dropout(drop_rate)
        self.layers = nn.ModuleList()
        for i, rates in enumerate(drop_path_rates(depths, drop_path_rate)[:built]):
            dim = embed_dim * 2**i
            blocks = [make_block(i, dim, rate) for rate in rates]
            downsample = _build_downsample(dim, conv_embed) if i + 1 < built else None
            self.layers.append(Stage(blocks, downsample, activation_checkpointing))
        self.output_norm = output_norm
        self._add_output_norms()
        self.apply(_init_weights)
        self.frozen_stages = _check_frozen_stages(frozen_stages, built)
        freeze(self._frozen_modules())

    def _add_output_norms(self) -> None:
        """Add ``norm{i}`` for each output feature, if there are to be any."""
        for i, name in enumerate(self.stage_names):
            if self.output_norm and name in self.out_features:
                self.add_module(f"norm{i}", nn.LayerNorm(self.shapes[name].channels))

    def forward(
        self, x: Tensor, image_sizes: Sequence[tuple[int, int]] | None = None
    ) -> dict[str, Tensor]:
        """Compute multi-scale features.

        Args:
            x: (N, in_channels, H, W), normalized images, padded at the right and bottom.
            image_sizes: (height, width) of each image without its padding, pixels. Required with
                ``valid_context``, refused without.
        Returns: {name: (N, C, ceil(H / stride), ceil(W / stride))} in channels-last memory order;
            with ``valid_context``, zero outside each image.
        Raises: ValueError if ``image_sizes`` is missing, unexpected or does not fit the batch.
        """
        self._check_image_sizes(image_sizes)
        if image_sizes is not None:
            x = x * valid_mask(image_sizes, 1, x)
        return self.forward_stages(self.pos_drop(self.patch_embed(x)), image_sizes)

    def forward_stages(
        self, tokens: Tensor, image_sizes: Sequence[tuple[int, int]] | None = None
    ) -> dict[str, Tensor]:
        """Compute the features of embedded patches, (N, H, W, C); see :meth:`forward`."""
        features: dict[str, Tensor] = {}
        for i, (name, layer) in enumerate(zip(self.stage_names, self.layers, strict=True)):
            valid = None
            if image_sizes is not None:
                valid = valid_mask(image_sizes, self.shapes[name].stride, channels_first(tokens))
            tokens = layer(tokens, valid)
            if name in self.out_features:
                normed = (
                    layer_norm(tokens, getattr(self, f"norm{i}")) if self.output_norm else tokens
                )
                feature = channels_first(normed)
                features[name] = feature if valid is None else feature * valid
            downsample = cast(Stage, layer).downsample
            if downsample is not None:
                feature = channels_first(tokens)
                tokens = downsample(feature if valid is None else feature * valid)
        return features

    def _check_image_sizes(self, image_sizes: Sequence[tuple[int, int]] | None) -> None:
        if self.valid_context and image_sizes is None:
            raise ValueError(
                "This backbone was built with valid_context=True: call it with image_sizes, the "
                "(height, width) in pixels of each image without its padding."
            )
        if image_sizes is not None and not self.valid_context:
            raise ValueError(
                "image_sizes has no effect on this backbone: build it with valid_context=True."
            )

    def output_shape(self) -> dict[str, FeatureShape]:
        """Return channels and stride of each output feature."""
        return {name: self.shapes[name] for name in self.stage_names if name in self.out_features}

    def train(self, mode: bool = True) -> "StagedBackbone":
        """Set the mode as ``nn.Module.train`` does; frozen modules stay in eval mode."""
        super().train(mode)
        keep_frozen_in_eval(self._frozen_modules())
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages is None:
            return []
        return [self.patch_embed, self.pos_drop, *self.layers[: self.frozen_stages]]


def feature_names(stages: int, patch_size: int) -> tuple[str, ...]:
    """Return the names of a network's stages by stride: stride 4 is ``stage1``, 16 is ``stage3``.

    Args:
        stages: number of stages.
        patch_size: stride of the first stage, pixels.
    Raises: ValueError if the patch size is not a power of two that is at least 4.
    """
    first = math.log2(patch_size) - 1
    if first < 1 or first != int(first):
        raise ValueError(f"patch_size must be a power of two and at least 4, got {patch_size}.")
    return tuple(f"stage{int(first) + i}" for i in range(stages))


def drop_path_rates(depths: Sequence[int], last_rate: float) -> list[list[float]]:
    """Return the drop path rate of each block of each stage: a linear increase from 0.

    Args:
        depths: blocks of each stage of the whole published network, even if its end is not built.
        last_rate: rate of the last block.
    """
    last = max(sum(depths) - 1, 1)
    rates = iter([last_rate * i / last for i in range(sum(depths))])
    return [list(islice(rates, depth)) for depth in depths]


def arguments_of_stages(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Select the keyword arguments of :class:`StagedBackbone` from a subclass's arguments."""
    names = inspect.getfullargspec(StagedBackbone.__init__).kwonlyargs
    return {name: arguments[name] for name in names if name in arguments}


def _build_downsample(dim: int, conv_embed: bool) -> PatchEmbed:
    kernel = 3 if conv_embed else None
    return PatchEmbed(dim, 2 * dim, stride=2, overlap_kernel=kernel, overlap_padding=1)


def _check_out_features(
    out_features: Sequence[str] | None, names: tuple[str, ...]
) -> tuple[str, ...]:
    if out_features is None:
        return names
    if isinstance(out_features, str) or not out_features or set(out_features) - set(names):
        raise ValueError(f"out_features must be some of {names}, got {out_features!r}.")
    return tuple(name for name in names if name in out_features)


def _check_frozen_stages(frozen_stages: int | None, stages: int) -> int | None:
    if frozen_stages is not None and not 0 <= frozen_stages <= stages:
        raise ValueError(
            f"frozen_stages must be None or an integer between 0 (the stem) and {stages}, "
            f"got {frozen_stages}."
        )
    return frozen_stages


def _init_weights(module: nn.Module) -> None:
    """Initialize linears as the official code does; convolutions keep PyTorch's default."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
