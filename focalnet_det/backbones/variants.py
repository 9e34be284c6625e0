"""List every published focal network, one row each, with all flags and its source."""

from dataclasses import dataclass
from fnmatch import fnmatch


@dataclass(frozen=True, kw_only=True)
class FocalNetSpec:
    """Constructor arguments of a FocalNet variant, and their source.

    Source: arXiv:2203.11926, table 1, and the yaml files of microsoft/FocalNet:configs.
    """

    embed_dim: int
    depths: tuple[int, ...]
    focal_levels: tuple[int, ...]
    focal_windows: tuple[int, ...]
    conv_embed: bool
    post_norm: bool
    post_norm_in_modulation: bool
    layer_scale: float | None
    normalize_modulator: bool
    drop_path_rate: float
    source: str
    mlp_ratio: float = 4.0
    patch_size: int = 4
    # 2 in the classification code that trained the weights, 3 in the official detection file.
    stem_padding: int = 2


@dataclass(frozen=True, kw_only=True)
class FocalTransformerSpec:
    """Constructor arguments of a Focal Transformer variant, version 1, and their source.

    The yaml files have `FOCAL_LEVELS: [2, 2, 2, 2]`, which counts the tokens themselves as a level:
    there is one level of pooled tokens. Layer scale, post-norm, window shift and absolute position
    embedding are off.

    Source: arXiv:2107.00641, table 1, and the yaml files of microsoft/Focal-Transformer:configs.
    """

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    conv_embed: bool
    drop_path_rate: float
    source: str
    focal_windows: tuple[int, ...] = (7, 5, 3, 1)
    window_size: int = 7
    expand_size: int = 3
    mlp_ratio: float = 4.0
    stem_padding: int = 2


@dataclass(frozen=True, kw_only=True)
class FocalTransformerV2Spec:
    """Constructor arguments of a Focal Transformer variant, version 2 ("focal fast").

    Source: the yaml files focalv2_*.yaml of microsoft/Focal-Transformer:configs.
    """

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    drop_path_rate: float
    source: str
    conv_embed: bool = True
    window_size: int = 7
    top_k: int = 128
    mlp_ratio: float = 4.0
    stem_padding: int = 2


BackboneSpec = FocalNetSpec | FocalTransformerSpec | FocalTransformerV2Spec


def _small(
    embed_dim: int, depths: tuple[int, ...], levels: int, drop_path_rate: float, source: str
) -> FocalNetSpec:
    """Return a row of the ImageNet-1k family: non-overlapping patches, pre-norm, window 3."""
    return FocalNetSpec(
        embed_dim=embed_dim,
        depths=depths,
        focal_levels=(levels,) * len(depths),
        focal_windows=(3,) * len(depths),
        conv_embed=False,
        post_norm=False,
        post_norm_in_modulation=False,
        layer_scale=None,
        normalize_modulator=False,
        drop_path_rate=drop_path_rate,
        source=f"microsoft/FocalNet:{source}",
    )


def _isotropic(embed_dim: int, *, post_norm: bool, layer_scale: float | None) -> FocalNetSpec:
    """Return a row with one stage of twelve blocks on 16x16 patches, as in a plain ViT."""
    return FocalNetSpec(
        embed_dim=embed_dim,
        depths=(12,),
        focal_levels=(3,),
        focal_windows=(3,),
        conv_embed=False,
        post_norm=post_norm,
        post_norm_in_modulation=False,
        layer_scale=layer_scale,
        normalize_modulator=False,
        drop_path_rate=0.2,
        patch_size=16,
        source="microsoft/FocalNet:classification/focalnet.py (focalnet_*_iso)",
    )


def _large(
    embed_dim: int,
    levels: int,
    window: int,
    *,
    post_norm_in_modulation: bool,
    normalize_modulator: bool,
    source: str,
) -> FocalNetSpec:
    """Return a row of the ImageNet-22k family: overlapping patches, post-norm, layer scale."""
    return FocalNetSpec(
        embed_dim=embed_dim,
        depths=(2, 2, 18, 2),
        focal_levels=(levels,) * 4,
        focal_windows=(window,) * 4,
        conv_embed=True,
        post_norm=True,
        post_norm_in_modulation=post_norm_in_modulation,
        layer_scale=1e-4,
        normalize_modulator=normalize_modulator,
        drop_path_rate=0.5,
        source=f"microsoft/FocalNet:{source}",
    )


FOCALNETS: dict[str, FocalNetSpec] = {
    "focalnet_tiny_srf": _small(96, (2, 2, 6, 2), 2, 0.2, "configs/focalnet_tiny_srf.yaml"),
    "focalnet_tiny_lrf": _small(96, (2, 2, 6, 2), 3, 0.2, "configs/focalnet_tiny_lrf.yaml"),
    "focalnet_small_srf": _small(96, (2, 2, 18, 2), 2, 0.3, "configs/focalnet_small_srf.yaml"),
    "focalnet_small_lrf": _small(96, (2, 2, 18, 2), 3, 0.3, "configs/focalnet_small_lrf.yaml"),
    "focalnet_base_srf": _small(128, (2, 2, 18, 2), 2, 0.5, "configs/focalnet_base_srf.yaml"),
    "focalnet_base_lrf": _small(128, (2, 2, 18, 2), 3, 0.5, "configs/focalnet_base_lrf.yaml"),
    "focalnet_tiny_iso": _isotropic(192, post_norm=False, layer_scale=None),
    "focalnet_small_iso": _isotropic(384, post_norm=False, layer_scale=None),
    # Post-norm and layer scale are set in the builder and the notebook only, not in the yaml file.
    "focalnet_base_iso": _isotropic(768, post_norm=True, layer_scale=1e-4),
    "focalnet_tiny_deeper": _small(64, (3, 3, 16, 3), 3, 0.2, "README.md (deeper T)"),
    "focalnet_small_deeper": _small(64, (4, 4, 28, 4), 3, 0.3, "README.md (deeper S)"),
    "focalnet_base_deeper": _small(96, (4, 4, 28, 4), 3, 0.5, "README.md (deeper B)"),
    "focalnet_large_fl3": _large(
        192,
        3,
        5,
        post_norm_in_modulation=False,
        normalize_modulator=False,
        source="configs/focalnet_large_fl3.yaml",
    ),
    # True in the official yaml and in FocalNet-DINO; timm does not set it.
    "focalnet_large_fl4": _large(
        192,
        4,
        3,
        post_norm_in_modulation=False,
        normalize_modulator=True,
        source="configs/focalnet_large_fl4.yaml",
    ),
    "focalnet_xlarge_fl3": _large(
        256,
        3,
        5,
        post_norm_in_modulation=False,
        normalize_modulator=False,
        source="configs/focalnet_xlarge_fl3.yaml",
    ),
    # Unset, so False, in the official yaml; True in FocalNet-DINO, whose files need an override.
    "focalnet_xlarge_fl4": _large(
        256,
        4,
        3,
        post_norm_in_modulation=False,
        normalize_modulator=False,
        source="configs/focalnet_xlarge_fl4.yaml",
    ),
    "focalnet_huge_fl3": _large(
        352,
        3,
        3,
        post_norm_in_modulation=True,
        normalize_modulator=False,
        source="configs/focalnet_huge_fl3.yaml",
    ),
    "focalnet_huge_fl4": _large(
        352,
        4,
        3,
        post_norm_in_modulation=True,
        normalize_modulator=False,
        source="configs/focalnet_huge_fl4.yaml",
    ),
    "focalnet_nano": FocalNetSpec(
        embed_dim=32,
        depths=(1, 1, 3, 1),
        focal_levels=(2, 2, 2, 2),
        focal_windows=(3, 3, 3, 3),
        conv_embed=False,
        post_norm=False,
        post_norm_in_modulation=False,
        layer_scale=None,
        normalize_modulator=False,
        drop_path_rate=0.0,
        source="this package: for demos and tests, never pretrained",
    ),
}


# Size -> channels of the first stage, blocks of the third, heads of the first, drop path rate.
_SIZES = {"tiny": (96, 6, 3, 0.2), "small": (96, 18, 3, 0.3), "base": (128, 18, 4, 0.5)}


def _focal(size: str, *, conv_embed: bool) -> FocalTransformerSpec:
    embed_dim, depth, heads, rate = _SIZES[size]
    file = f"focal_{size}{'_useconv' if conv_embed else ''}_patch4_window7_224.yaml"
    return FocalTransformerSpec(
        embed_dim=embed_dim,
        depths=(2, 2, depth, 2),
        num_heads=(heads, 2 * heads, 4 * heads, 8 * heads),
        conv_embed=conv_embed,
        drop_path_rate=rate,
        source=f"microsoft/Focal-Transformer:configs/{file}",
    )


def _focal_fast(size: str) -> FocalTransformerV2Spec:
    embed_dim, depth, heads, rate = _SIZES[size]
    return FocalTransformerV2Spec(
        embed_dim=embed_dim,
        depths=(2, 2, depth, 2),
        num_heads=(heads, 2 * heads, 4 * heads, 8 * heads),
        drop_path_rate=rate,
        source=f"microsoft/Focal-Transformer:configs/focalv2_{size}_useconv_patch4_window7_224.yaml",
    )


FOCAL_TRANSFORMERS: dict[str, FocalTransformerSpec | FocalTransformerV2Spec] = {
    **{f"focal_{size}": _focal(size, conv_embed=False) for size in _SIZES},
    **{f"focal_{size}_conv": _focal(size, conv_embed=True) for size in _SIZES},
    **{f"focal_fast_{size}": _focal_fast(size) for size in _SIZES},
    # No file is public: heads have 32 channels each as in the others, the rate is that of base.
    "focal_large": FocalTransformerSpec(
        embed_dim=192,
        depths=(2, 2, 18, 2),
        num_heads=(6, 12, 24, 48),
        conv_embed=False,
        drop_path_rate=0.5,
        source="arXiv:2107.00641, section 4 (Focal-Large); heads inferred",
    ),
    "focal_nano": FocalTransformerSpec(
        embed_dim=32,
        depths=(1, 1, 3, 1),
        num_heads=(1, 2, 4, 8),
        conv_embed=False,
        drop_path_rate=0.0,
        source="this package: for demos and tests, never pretrained",
    ),
}
VARIANTS: dict[str, BackboneSpec] = {**FOCALNETS, **FOCAL_TRANSFORMERS}


def list_backbones(pattern: str = "*") -> list[str]:
    """Return the sorted names of the variants that match a pattern.

    Args:
        pattern: as in :mod:`fnmatch`, such as ``"focalnet_*_lrf"``.
    """
    return sorted(name for name in VARIANTS if fnmatch(name, pattern))


def variant(name: str) -> BackboneSpec:
    """Return the row of a variant.

    Raises: KeyError that lists the known names.
    """
    if name not in VARIANTS:
        raise KeyError(f"Unknown variant {name!r}. Known: {', '.join(sorted(VARIANTS))}.")
    return VARIANTS[name]
