"""List the parameter names of the public copies of FocalNet, with one table of rows per layout.

All names are translated to and from those of the official classification code, which
:class:`FocalNet` also has.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from . import focal_transformer_names as focal_transformer

BLOCK = "layers.{i}.blocks.{j}"
PAIR = ("weight", "bias")

# Module of the official code -> its parameters; "" for a bare parameter.
MODULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "patch_embed.proj": PAIR,
        "patch_embed.norm": PAIR,
        f"{BLOCK}.norm1": PAIR,
        f"{BLOCK}.norm2": PAIR,
        f"{BLOCK}.modulation.f": PAIR,
        f"{BLOCK}.modulation.h": PAIR,
        f"{BLOCK}.modulation.proj": PAIR,
        f"{BLOCK}.modulation.ln": PAIR,
        f"{BLOCK}.modulation.focal_layers.{{k}}.0": ("weight",),
        # Added by this package while a network with added levels trains; see global_level.py.
        f"{BLOCK}.modulation.global_level": ("",),
        f"{BLOCK}.mlp.fc1": PAIR,
        f"{BLOCK}.mlp.fc2": PAIR,
        f"{BLOCK}.gamma_1": ("",),
        f"{BLOCK}.gamma_2": ("",),
        "layers.{i}.downsample.proj": PAIR,
        "layers.{i}.downsample.norm": PAIR,
        "norm": PAIR,
        "head": PAIR,
        # Of masked image modeling in this package; the official code has none.
        "mask_token": ("",),
        "decoder.0": PAIR,
        **{f"norm{i}": PAIR for i in range(4)},
    }
)
# Modules of both families; other libraries have FocalNet only.
PARTS = {**MODULES, **focal_transformer.MODULES}
# Linear layers, (out, in), which timm stores as 1x1 convolutions, (out, in, 1, 1).
LINEARS = ("modulation.f", "modulation.proj", "mlp.fc1", "mlp.fc2")
OUTPUT_NORMS = tuple(f"norm{i}" for i in range(4))
# Modules that other libraries do not have, or not under these names.
OWN_MODULES = (f"{BLOCK}.modulation.global_level", "mask_token", "decoder.0")

_PLACEHOLDER = re.compile(r"\{([a-z])([+-]\d+)?\}")
Tokens = tuple[str, ...]


class Names:
    """Name templates such as ``layers.{i}.blocks.{j}.norm1.weight``, searched by name.

    ``{i+1}`` is an index that is larger by one than ``{i}`` on the other side of the row.
    """

    def __init__(self, templates: Iterable[str]) -> None:
        self._rows: dict[Tokens, list[tuple[int, Tokens]]] = {}
        for number, template in enumerate(templates):
            tokens = tuple(template.split("."))
            shape = tuple("#" if t.isdigit() or _PLACEHOLDER.fullmatch(t) else t for t in tokens)
            self._rows.setdefault(shape, []).append((number, tokens))

    def find(self, name: str) -> tuple[int, dict[str, int]] | None:
        """Return the number of the template that matches a name, and its indices, or None."""
        tokens = tuple(name.split("."))
        shape = tuple("#" if t.isdecimal() and t.isascii() else t for t in tokens)
        for number, template in self._rows.get(shape, ()):
            indices = _bind(template, tokens)
            if indices is not None:
                return number, indices
        return None


def _bind(template: Tokens, tokens: Tokens) -> dict[str, int] | None:
    indices: dict[str, int] = {}
    for expected, token in zip(template, tokens, strict=True):
        placeholder = _PLACEHOLDER.fullmatch(expected)
        if placeholder is None:
            if expected != token:
                return None
            continue
        index = int(token) - int(placeholder[2] or 0)
        # Also refuses "01", which would be written back as "1".
        if index < 0 or str(int(token)) != token:
            return None
        indices[placeholder[1]] = index
    return indices


def fill(template: str, indices: Mapping[str, int]) -> str:
    """Fill the placeholders of a template with indices."""
    return _PLACEHOLDER.sub(lambda m: str(indices[m[1]] + int(m[2] or 0)), template)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One row of the table of layouts.

    Attributes:
        title: name for messages.
        modules: official module -> module of this layout; others do not exist in it.
        prefixes: possible prefixes of all names except those in ``outside``; the first is used for
            writing.
        companion: pattern of a name outside the backbone that distinguishes this layout from others
            with equal backbone names.
        post_norm_modules: overrides of ``modules`` for post-norm networks.
        outside: modules without the prefix.
        aliases: (pattern, replacement), applied to names before the lookup.
        drops: (pattern, rule) of names that are dropped.
        linear_as_conv: linear layers are stored as 1x1 convolutions.
        container: key under which files of torch.save store the state dict.
        writable: files can be written in this layout.
        source: public file that defines the names.
    """

    title: str
    modules: Mapping[str, str]
    prefixes: tuple[str, ...] = ("",)
    companion: str = ""
    post_norm_modules: Mapping[str, str] = field(default_factory=dict)
    outside: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    drops: tuple[tuple[str, str], ...] = ()
    linear_as_conv: bool = False
    container: str | None = None
    writable: bool = False
    source: str

    def rows(self) -> list[tuple[str, str, bool]]:
        """List (official parameter, parameter of this layout, True if it has no prefix)."""
        pairs = [*self.modules.items(), *self.post_norm_modules.items()]
        return [
            (_join(ours, part), _join(theirs, part), ours in self.outside)
            for ours, theirs in pairs
            for part in PARTS[ours]
        ]


def _join(module: str, part: str) -> str:
    return f"{module}.{part}" if part else module


_SAME = {module: module for module in PARTS}
_HF_LAYER = "encoder.stages.{i}.layers.{j}"
_HF = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "patch_embed.norm": "embeddings.norm",
    f"{BLOCK}.norm1": f"{_HF_LAYER}.norm1",
    f"{BLOCK}.norm2": f"{_HF_LAYER}.norm2",
    f"{BLOCK}.modulation.f": f"{_HF_LAYER}.modulation.projection_in",
    f"{BLOCK}.modulation.h": f"{_HF_LAYER}.modulation.projection_context",
    f"{BLOCK}.modulation.proj": f"{_HF_LAYER}.modulation.projection_out",
    f"{BLOCK}.modulation.ln": f"{_HF_LAYER}.modulation.layernorm",
    f"{BLOCK}.modulation.focal_layers.{{k}}.0": f"{_HF_LAYER}.modulation.focal_layers.{{k}}.0",
    f"{BLOCK}.mlp.fc1": f"{_HF_LAYER}.mlp.fc1",
    f"{BLOCK}.mlp.fc2": f"{_HF_LAYER}.mlp.fc2",
    f"{BLOCK}.gamma_1": f"{_HF_LAYER}.gamma_1",
    f"{BLOCK}.gamma_2": f"{_HF_LAYER}.gamma_2",
    "layers.{i}.downsample.proj": "encoder.stages.{i}.downsample.projection",
    "layers.{i}.downsample.norm": "encoder.stages.{i}.downsample.norm",
    "norm": "layernorm",
    "head": "classifier",
    "mask_token": "embeddings.mask_token",
    "decoder.0": "decoder.0",
}
_TIMM = {
    **{module: module for module in MODULES if module not in OUTPUT_NORMS},
    "patch_embed.proj": "stem.proj",
    "patch_embed.norm": "stem.norm",
    f"{BLOCK}.modulation.ln": f"{BLOCK}.modulation.norm",
    f"{BLOCK}.gamma_1": f"{BLOCK}.ls1.gamma",
    f"{BLOCK}.gamma_2": f"{BLOCK}.ls2.gamma",
    # timm downsamples at the start of a stage, the official code at the end.
    "layers.{i}.downsample.proj": "layers.{i+1}.downsample.proj",
    "layers.{i}.downsample.norm": "layers.{i+1}.downsample.norm",
    "head": "head.fc",
}
for _own in OWN_MODULES:
    del _TIMM[_own]
_MMPRETRAIN = {
    **{module: module for module in MODULES if module not in OUTPUT_NORMS},
    "patch_embed.proj": "patch_embed.projection",
    f"{BLOCK}.norm1": f"{BLOCK}.ln1",
    f"{BLOCK}.norm2": f"{BLOCK}.ln2",
    f"{BLOCK}.modulation.focal_layers.{{k}}.0": f"{BLOCK}.modulation.focal_layers.{{k}}.conv",
    f"{BLOCK}.mlp.fc1": f"{BLOCK}.ffn.layers.0.0",
    f"{BLOCK}.mlp.fc2": f"{BLOCK}.ffn.layers.1",
    f"{BLOCK}.gamma_1": f"{BLOCK}.gamma1.weight",
    f"{BLOCK}.gamma_2": f"{BLOCK}.gamma2.weight",
    "layers.{i}.downsample.proj": "layers.{i}.downsample.projection",
    # The output norm of the last stage, which its classifier reads, is the official final norm.
    "norm": "norm3",
    "head": "head.fc",
}
for _own in OWN_MODULES:
    del _MMPRETRAIN[_own]

# Order decides between layouts that fit equally well.
LAYOUTS: dict[str, Layout] = {
    "official": Layout(
        title="official classification",
        modules=_SAME,
        drops=focal_transformer.DROPS,
        prefixes=("", "visual."),
        container="model",
        writable=True,
        source="microsoft/FocalNet:classification/focalnet.py",
    ),
    "timm": Layout(
        title="timm",
        modules=_TIMM,
        post_norm_modules={
            f"{BLOCK}.norm1": f"{BLOCK}.norm1_post",
            f"{BLOCK}.norm2": f"{BLOCK}.norm2_post",
        },
        # features_only=True flattens the stages.
        aliases=((r"^layers_(\d+)\.", r"layers.\1."),),
        linear_as_conv=True,
        writable=True,
        source="huggingface/pytorch-image-models:timm/models/focalnet.py",
    ),
    "huggingface": Layout(
        title="Hugging Face transformers",
        modules=_HF,
        prefixes=("focalnet.", ""),
        outside=("head", "decoder.0"),
        # The converter of transformers left the official name on the huge models.
        aliases=((r"\.modulation\.ln\.", ".modulation.layernorm."),),
        writable=True,
        source="huggingface/transformers:src/transformers/models/focalnet/modeling_focalnet.py",
    ),
    "mmpretrain": Layout(
        title="mmpretrain",
        modules=_MMPRETRAIN,
        prefixes=("backbone.", ""),
        outside=("head",),
        container="state_dict",
        source="open-mmlab/mmpretrain: the FocalNet backbone proposed for it",
    ),
    "mmdet": Layout(
        title="official detection (mmdet)",
        modules=_SAME,
        drops=focal_transformer.DROPS,
        prefixes=("backbone.",),
        companion=r"(neck\.(lateral|fpn)_convs|rpn_head|roi_head|bbox_head)\.",
        container="state_dict",
        source="microsoft/FocalNet:detection/mmdet/models/backbones/focalnet.py",
    ),
    "mmseg": Layout(
        title="official segmentation (mmseg)",
        modules=_SAME,
        drops=focal_transformer.DROPS,
        prefixes=("backbone.",),
        companion=r"(decode_head|auxiliary_head)\.",
        container="state_dict",
        source="microsoft/FocalNet:segmentation/mmseg/models/backbones/focalnet.py",
    ),
    "focalnet_dino": Layout(
        title="FocalNet-DINO",
        modules=_SAME,
        prefixes=("backbone.0.",),
        companion=r"transformer\.",
        container="model",
        source="FocalNet/FocalNet-DINO:models/dino/focal.py",
    ),
    "detrex": Layout(
        title="detrex",
        modules=_SAME,
        prefixes=("backbone.",),
        companion=r"(transformer|neck\.convs|criterion)\.",
        container="model",
        source="IDEA-Research/detrex:detrex/modeling/backbone/focalnet.py",
    ),
    "xdecoder": Layout(
        title="X-Decoder, SEEM or MaskDINO",
        modules=_SAME,
        prefixes=("backbone.",),
        companion=r"sem_seg_head\.(pixel_decoder|predictor)\.",
        source="UX-Decoder/Segment-Everything-Everywhere-All-At-Once:modeling/vision/backbone/focal.py",
    ),
    "detectron2": Layout(
        title="Detectron2, as saved here",
        modules=_SAME,
        drops=focal_transformer.DROPS,
        prefixes=("backbone.bottom_up.", "backbone."),
        companion=r"(proposal_generator|roi_heads|sem_seg_head|backbone\.fpn_|backbone\.top_block|pixel_)",
        container="model",
        writable=True,
        source="this package",
    ),
}
WRITABLE = tuple(name for name, layout in LAYOUTS.items() if layout.writable)
