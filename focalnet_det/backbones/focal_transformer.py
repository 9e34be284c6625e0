"""Define Focal Transformer (arXiv:2107.00641), versions 1 and 2, as multi-scale backbones.

Parameter names are those of the official classification code, so its files load by identity.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import DropPath, Mlp, has_hooks, layer_norm
from ..ops import window_attention
from ..ops.focal_block import autograd, policy
from ..ops.focal_block.pytorch.training import Residual
from ..ops.focal_block.weights import Affine, MlpWeights
from .attention import FocalAttention, NearestAttention, WindowAttention
from .stages import StagedBackbone, arguments_of_stages
from .validation import check_transformer_arguments


class FocalTransformerBlock(nn.Module):
    """Attention and MLP, each pre-norm with a residual connection.

    Args:
        dim: channels C.
        attention: focal attention of either version.
        mlp_ratio: hidden channels of the MLP divided by ``dim``.
        drop_rate: dropout probability after the attention and in the MLP.
        drop_path_rate: stochastic depth probability.
    Source: arXiv:2107.00641, section 3.1.
    """

    def __init__(
        self,
        dim: int,
        attention: WindowAttention,
        *,
        mlp_ratio: float,
        drop_rate: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        self.pool_layers = nn.ModuleList([nn.Linear(attention.window_size**2, 1)])
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.proj_drop = nn.Dropout(drop_rate)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Transform (N, H, W, C); ``valid`` is (N, 1, H, W), one inside an image."""
        branch = self.attn(layer_norm(x, self.norm1), self.pool_layers[0], valid)
        return self._add_mlp(x + self.drop_path(self.proj_drop(branch)))

    def _add_mlp(self, x: Tensor) -> Tensor:
        backend = policy.choose_backend(x, exact=self._is_plain, windows=(1,))
        drops = self.training and self.mlp.drop.p > 0
        if backend == "reference" or drops or window_attention.is_recording_graph():
            return x + self.drop_path(self.mlp(self.norm2(x)))
        # Without gradients nothing needs to be saved for a backward pass.
        recompute = not torch.is_grad_enabled()
        computing = autograd.ComputePolicy(backend, *policy.compute_dtype(x), recompute)
        norm = Affine(self.norm2.weight, self.norm2.bias, self.norm2.eps)
        layers = (Affine(layer.weight, layer.bias) for layer in (self.mlp.fc1, self.mlp.fc2))
        scales = self.drop_path.sample_scales(x, computing.stored)
        return autograd.mlp(x, norm, MlpWeights(*layers), computing, Residual(scales))

    def _is_plain(self) -> bool:
        """Tell whether the fused MLP computes what the layers do, from their parameters alone."""
        children = self.mlp.fc1, self.mlp.act, self.mlp.fc2, self.mlp.drop
        plain = nn.Linear, nn.GELU, nn.Linear, nn.Dropout
        return (
            type(self.norm2) is nn.LayerNorm
            and all(type(c) is t for c, t in zip(children, plain, strict=True))
            and not any(has_hooks(m) for m in (self.norm2, self.mlp, *children))
        )


class FocalTransformer(StagedBackbone):
    """Focal Transformer, version 1: an image batch in, a dict of feature maps out.

    Any image size works. As in the published blocks, maps are zero-padded to whole windows after
    the norm, the padding takes part in attention, and windows have no neighbors on maps of at most
    one window across.

    Args:
        num_heads: attention heads of each stage.
        mlp_ratio: hidden channels of the MLPs divided by the channels of their stage.
        window_size: side of a window, odd, tokens.
        expand_size: width of the ring of neighbors around a window, at most half a window, tokens;
            0 for none.
        focal_windows: for each stage, side of the square of pooled tokens around a window, odd.
        valid_context: accept ``image_sizes`` in :meth:`forward`, and make features independent of
            batch padding: windows then read neither padding nor tokens across the border of the
            map. Published results do not use it.
        in_channels, embed_dim, depths, conv_embed, drop_rate, drop_path_rate, out_features,
            output_norm, frozen_stages, activation_checkpointing, stem_padding: see
            :class:`StagedBackbone`.
    Raises: ValueError for a value that is out of range or does not fit the others.
    Source: arXiv:2107.00641; microsoft/Focal-Transformer:classification/focal_transformer.py.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        window_size: int = 7,
        expand_size: int = 3,
        focal_windows: Sequence[int] = (7, 5, 3, 1),
        conv_embed: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_features: Sequence[str] | None = None,
        output_norm: bool = True,
        frozen_stages: int | None = None,
        activation_checkpointing: bool = False,
        valid_context: bool = False,
        stem_padding: int = 2,
    ) -> None:
        arguments = locals()
        check_transformer_arguments(arguments)

        def make_block(stage: int, dim: int, rate: float) -> FocalTransformerBlock:
            attention = FocalAttention(
                dim,
                num_heads=num_heads[stage],
                window_size=window_size,
                expand_size=expand_size,
                focal_window=focal_windows[stage],
            )
            return FocalTransformerBlock(
                dim, attention, mlp_ratio=mlp_ratio, drop_rate=drop_rate, drop_path_rate=rate
            )

        super().__init__(make_block, patch_size=4, **arguments_of_stages(arguments))


class FocalTransformerV2(StagedBackbone):
    """Focal Transformer, version 2 ("focal fast"): windows read the tokens closest to them.

    Any image size works: maps are zero-padded to whole windows; the padding is pooled but not read
    as keys.

    Args:
        num_heads, mlp_ratio, window_size: see :class:`FocalTransformer`.
        top_k: number of tokens, and of pooled tokens, that a window reads, if the map has as many.
        valid_context: as in :class:`FocalTransformer`; windows then read only tokens of their
            image.
        in_channels, embed_dim, depths, conv_embed, drop_rate, drop_path_rate, out_features,
            output_norm, frozen_stages, activation_checkpointing, stem_padding: see
            :class:`StagedBackbone`.
    Raises: ValueError for a value that is out of range or does not fit the others.
    Source: microsoft/Focal-Transformer:classification/focal_transformer_v2.py.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        window_size: int = 7,
        top_k: int = 128,
        conv_embed: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        out_features: Sequence[str] | None = None,
        output_norm: bool = True,
        frozen_stages: int | None = None,
        activation_checkpointing: bool = False,
        valid_context: bool = False,
        stem_padding: int = 2,
    ) -> None:
        arguments = locals()
        check_transformer_arguments(arguments)

        def make_block(stage: int, dim: int, rate: float) -> FocalTransformerBlock:
            attention = NearestAttention(
                dim, num_heads=num_heads[stage], window_size=window_size, top_k=top_k
            )
            return FocalTransformerBlock(
                dim, attention, mlp_ratio=mlp_ratio, drop_rate=drop_rate, drop_path_rate=rate
            )

        super().__init__(make_block, patch_size=4, **arguments_of_stages(arguments))
