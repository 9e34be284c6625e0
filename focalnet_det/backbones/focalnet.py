"""Define FocalNet (arXiv:2203.11926) as a multi-scale backbone in plain PyTorch.

Parameter names are those of the official classification code, so its files load by identity.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ..layers import DropPath, Mlp, channels_first, channels_last, layer_scale_parameter
from ..ops import aggregate_contexts
from . import fast_block
from .stages import StagedBackbone
from .validation import check_arguments


@fast_block.register_plain
class FocalModulation(nn.Module):
    """Focal modulation: ``y = proj(query * h(aggregated contexts))``.

    Args:
        dim: channels C.
        focal_level: number of depthwise levels L.
        focal_window: kernel of the first level; level k has kernel ``focal_window + 2k``.
        normalize_modulator: divide the aggregated context by L+1.
        post_norm: LayerNorm before the output projection.
        drop_rate: dropout after the output projection.
    Source: arXiv:2203.11926, section 3.2, equations 3-7, figure 2 (right).
    """

    def __init__(
        self,
        dim: int,
        *,
        focal_level: int,
        focal_window: int,
        normalize_modulator: bool = False,
        post_norm: bool = False,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.focal_level = focal_level
        self.focal_windows = tuple(range(focal_window, focal_window + 2 * focal_level, 2))
        self.normalize_modulator = normalize_modulator
        self.f = nn.Linear(dim, 2 * dim + focal_level + 1)
        self.h = nn.Conv2d(dim, dim, 1)
        # The Sequential gives the official parameter names; there it also holds the GELU.
        self.focal_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim, bias=False))
            for k in self.focal_windows
        )
        self.ln = nn.LayerNorm(dim) if post_norm else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Modulate a feature map.

        Args:
            x: (N, H, W, C).
            valid: (N, 1, H, W), see :func:`aggregate_contexts`.
        Returns: (N, H, W, C).
        """
        query, context, gates = self.f(x).split((self.dim, self.dim, self.focal_level + 1), dim=-1)
        aggregated = aggregate_contexts(
            channels_first(context),
            channels_first(gates),
            list(self.focal_layers.parameters()),
            normalize=self.normalize_modulator,
            valid=None if valid is None else valid.to(context.dtype),
        )
        modulator = channels_last(self.h(aggregated))
        x = query * modulator
        if self.ln is not None:
            x = self.ln(x)
        return self.proj_drop(self.proj(x))


class FocalNetBlock(nn.Module):
    """Focal modulation and MLP, each pre- or post-norm with a residual connection.

    Args:
        dim: channels C.
        mlp_ratio: hidden channels of the MLP divided by ``dim``.
        focal_level, focal_window, normalize_modulator: see :class:`FocalModulation`.
        post_norm: normalize the branches' outputs instead of their inputs.
        post_norm_in_modulation: ``post_norm`` of :class:`FocalModulation`.
        layer_scale: initial value of the branches' learnable scales, None for none.
        drop_rate: dropout probability of the modulation and the MLP.
        drop_path_rate: stochastic depth probability.
        lean_training: see :class:`FocalNet`.
    Source: arXiv:2203.11926, section 3.3; post-norm and layer scale as in
    microsoft/FocalNet:classification/focalnet.py (FocalNetBlock).
    """

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float,
        focal_level: int,
        focal_window: int,
        post_norm: bool,
        post_norm_in_modulation: bool,
        layer_scale: float | None,
        normalize_modulator: bool,
        drop_rate: float,
        drop_path_rate: float,
        lean_training: bool = False,
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.lean_training = lean_training
        self.norm1 = nn.LayerNorm(dim)
        self.modulation = FocalModulation(
            dim,
            focal_level=focal_level,
            focal_window=focal_window,
            normalize_modulator=normalize_modulator,
            post_norm=post_norm_in_modulation,
            drop_rate=drop_rate,
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop_rate)
        self.drop_path = DropPath(drop_path_rate)
        self.gamma_1 = layer_scale_parameter(dim, layer_scale)
        self.gamma_2 = layer_scale_parameter(dim, layer_scale)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Transform (N, H, W, C); ``valid`` is (N, 1, H, W), one inside an image."""
        fast = fast_block.run(self, x, valid)
        if fast is not None:
            return fast
        if self.post_norm:
            x = self.add_branch(x, self.norm1(self.modulation(x, valid)), self.gamma_1)
            return self.add_branch(x, self.norm2(self.mlp(x)), self.gamma_2)
        x = self.add_branch(x, self.modulation(self.norm1(x), valid), self.gamma_1)
        return self.add_branch(x, self.mlp(self.norm2(x)), self.gamma_2)

    def add_branch(self, x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
        """Add a branch to ``x``, both (N, H, W, C), with layer scale (C,) and stochastic depth."""
        if scale is not None:
            branch = scale * branch
        return x + self.drop_path(branch)


class FocalNet(StagedBackbone):
    """FocalNet backbone: an image batch in, a dict of feature maps out.

    Features are named ``stage1`` .. ``stage4``, where ``stageK`` has stride ``2**(K+1)``: an
    isotropic network, one stage on 16x16 patches, returns ``stage3`` only. Any image size works:
    maps are zero-padded at the right and bottom where a stride does not divide their sides.

    Args:
        in_channels: image channels.
        embed_dim: channels of the first stage; each further stage doubles them.
        depths: number of blocks of each stage.
        mlp_ratio: hidden channels of the MLPs divided by the channels of their stage.
        focal_levels, focal_windows: for each stage, see :class:`FocalModulation`; windows are odd.
        conv_embed: overlapping stem and downsampling (7x7 and 3x3) instead of 4x4 and 2x2.
        post_norm, post_norm_in_modulation, normalize_modulator: see :class:`FocalNetBlock`.
        layer_scale: initial value of the branches' learnable scales, None for none.
        drop_rate: dropout probability of the embedding, the MLPs and the modulations.
        drop_path_rate: stochastic depth probability of the last block; it increases linearly from
            0 at the first block.
        out_features: names of the features to return, None for all; later stages that no feature
            needs are not built.
        output_norm: LayerNorm ``norm{i}`` on each output, as in the official detection code.
        frozen_stages: None freezes nothing, 0 the stem, k the stem and ``layers[0..k-1]`` (with
            their downsampling). Frozen modules stay in eval mode. Output norms are never frozen:
            no published file contains them.
        activation_checkpointing: recompute each block in the backward pass to save memory.
        lean_training: save only the inputs of modulations and MLPs for the backward pass, with the
            fused backends (docs/performance.md): slower than the default, faster than activation
            checkpointing.
        valid_context: accept ``image_sizes`` in :meth:`forward`, and make features independent of
            batch padding. Published results do not use it.
        patch_size: stride of the stem, pixels.
        stem_padding: padding of the ``conv_embed`` stem, pixels: 2 in the classification code that
            trained the published weights, 3 in the official detection file.
    Raises: ValueError for a value that is out of range or inconsistent with the others.
    Source: arXiv:2203.11926; microsoft/FocalNet:classification/focalnet.py, and
    FocalNet/FocalNet-DINO:models/dino/focal.py for the large models as detection backbones.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        mlp_ratio: float = 4.0,
        focal_levels: Sequence[int] = (2, 2, 2, 2),
        focal_windows: Sequence[int] = (3, 3, 3, 3),
        conv_embed: bool = False,
        post_norm: bool = False,
        post_norm_in_modulation: bool = False,
        layer_scale: float | None = None,
        normalize_modulator: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_features: Sequence[str] | None = None,
        output_norm: bool = True,
        frozen_stages: int | None = None,
        activation_checkpointing: bool = False,
        lean_training: bool = False,
        valid_context: bool = False,
        patch_size: int = 4,
        stem_padding: int = 2,
    ) -> None:
        check_arguments(locals())

        def make_block(stage: int, dim: int, rate: float) -> FocalNetBlock:
            return FocalNetBlock(
                dim,
                mlp_ratio=mlp_ratio,
                focal_level=focal_levels[stage],
                focal_window=focal_windows[stage],
                post_norm=post_norm,
                post_norm_in_modulation=post_norm_in_modulation,
                layer_scale=layer_scale,
                normalize_modulator=normalize_modulator,
                drop_rate=drop_rate,
                drop_path_rate=rate,
                lean_training=lean_training,
            )

        super().__init__(
            make_block,
            in_channels=in_channels,
            embed_dim=embed_dim,
            depths=depths,
            conv_embed=conv_embed,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            out_features=out_features,
            output_norm=output_norm,
            frozen_stages=frozen_stages,
            activation_checkpointing=activation_checkpointing,
            valid_context=valid_context,
            patch_size=patch_size,
            stem_padding=stem_padding,
        )
