"""Save FocalNets as transformers saves its own, and build ours from such folders."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..atomic import write_text
from ..backbones import FocalNet
from ..backbones.classifier import Classifier, HeadedNetwork
from ..backbones.focalnet import FocalNetBlock
from ..backbones.masked_images import MaskedImageModel
from ..checkpoint.convert import huggingface_config
from ..checkpoint.files import read_state_dict, write_state_dict
from ..checkpoint.headed import load_headed
from ..checkpoint.inspect import normalizes_modulator
from ..checkpoint.layouts.translate import write
from ..checkpoint.load import load_pretrained

WEIGHTS, CONFIG = "model.safetensors", "config.json"
BACKBONE = "FocalNetBackbone"
CLASSIFIER = "FocalNetForImageClassification"
MASKED_IMAGES = "FocalNetForMaskedImageModeling"
# What every FocalNet here has, and a config of transformers may change.
FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-5}
# Field of transformers -> constructor argument of FocalNet.
FIELDS = {
    "num_channels": "in_channels",
    "patch_size": "patch_size",
    "embed_dim": "embed_dim",
    "depths": "depths",
    "mlp_ratio": "mlp_ratio",
    "focal_levels": "focal_levels",
    "focal_windows": "focal_windows",
    "use_conv_embed": "conv_embed",
    "use_post_layernorm": "post_norm",
    "use_post_layernorm_in_modulation": "post_norm_in_modulation",
    "normalize_modulator": "normalize_modulator",
    "hidden_dropout_prob": "drop_rate",
    "drop_path_rate": "drop_path_rate",
}
# Values of transformers' FocalNetConfig, which it does not write into a config.json.
DEFAULTS: dict[str, Any] = {
    "num_channels": 3,
    "patch_size": 4,
    "embed_dim": 96,
    "depths": [2, 2, 6, 2],
    "mlp_ratio": 4.0,
    "focal_levels": [2, 2, 2, 2],
    "focal_windows": [3, 3, 3, 3],
    "use_conv_embed": False,
    "use_post_layernorm": False,
    "use_post_layernorm_in_modulation": False,
    "normalize_modulator": False,
    "hidden_dropout_prob": 0.0,
    "drop_path_rate": 0.1,
    "use_layerscale": False,
    "layerscale_value": 1e-4,
}


def label_tables(class_names: Sequence[str], num_classes: int) -> dict[str, Any]:
    """Return the fields of ``config.json`` that name the classes; without names, numbers.

    Raises: ValueError if there are not as many names as classes.
    """
    names = list(class_names) or [f"LABEL_{i}" for i in range(num_classes)]
    if len(names) != num_classes:
        raise ValueError(f"{len(names)} class names for {num_classes} outputs.")
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def save_huggingface(
    net: nn.Module,
    folder: str | Path,
    *,
    class_names: Sequence[str] = (),
    image_size: int = 224,
) -> Path:
    """Save a FocalNet as ``config.json`` and ``model.safetensors`` of transformers.

    Args:
        net: a ``Classifier`` (``FocalNetForImageClassification``), a ``MaskedImageModel``
            (``FocalNetForMaskedImageModeling``) or a ``FocalNet`` without output norms
            (``FocalNetBackbone``, whose ``stage1`` is ours after its downsampling).
        folder: output folder.
        class_names: of the classifier's outputs.
        image_size: pixels; masked image models of transformers take squares of this size alone.
    Returns: the folder.
    Raises: ValueError for a network that transformers cannot express.
    """
    folder = Path(folder)
    backbone = net.backbone if isinstance(net, HeadedNetwork) else net
    if not isinstance(backbone, FocalNet):
        raise ValueError(f"transformers has FocalNets only, got {type(backbone).__name__}.")
    check_expressible(backbone)
    state = dict(net.state_dict())
    if net is backbone:
        # transformers has a final norm there, which its feature maps do not pass.
        last = backbone.shapes[backbone.stage_names[-1]].channels
        state |= {"norm.weight": torch.ones(last), "norm.bias": torch.zeros(last)}
    tensors, dropped = write(state, "huggingface")
    if dropped:
        raise ValueError(f"transformers has no {', '.join(sorted(dropped)[:3])}.")
    config = config_of(net, backbone, state, image_size)
    if isinstance(net, Classifier):
        config |= label_tables(class_names, net.num_classes)
    folder.mkdir(parents=True, exist_ok=True)
    write_state_dict(folder / WEIGHTS, tensors)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return folder


def check_expressible(backbone: FocalNet) -> None:
    """Raise: ValueError that names the setting which transformers does not have."""
    stem = backbone.patch_embed.proj
    problems = {
        "output norms (output_norm=True)": backbone.output_norm,
        "a stem of another padding (stem_padding)": stem.kernel_size != stem.stride
        and stem.padding != (2, 2),
        "features that ignore padding (valid_context=True)": backbone.valid_context,
    }
    for what, present in problems.items():
        if present:
            raise ValueError(f"A FocalNet of transformers cannot have {what}.")


def config_of(
    net: nn.Module, backbone: FocalNet, state: Mapping[str, Tensor], image_size: int
) -> dict[str, Any]:
    """Return the config of transformers for a network and its state dict in official names."""
    block = [module for module in backbone.modules() if isinstance(module, FocalNetBlock)][-1]
    config = huggingface_config(state) | {
        "architectures": [_architecture(net)],
        "normalize_modulator": normalizes_modulator(backbone),
        "hidden_dropout_prob": backbone.pos_drop.p,
        "drop_path_rate": block.drop_path.rate,
        "image_size": image_size,
        "encoder_stride": backbone.shapes[backbone.stage_names[-1]].stride,
    }
    if isinstance(net, Classifier):
        return config
    return {name: value for name, value in config.items() if name != "id2label"}


def _architecture(net: nn.Module) -> str:
    if isinstance(net, Classifier):
        return CLASSIFIER
    return MASKED_IMAGES if isinstance(net, MaskedImageModel) else BACKBONE


def load_huggingface(folder: str | Path) -> Classifier | MaskedImageModel | FocalNet:
    """Build the network that a folder of transformers holds, with its weights.

    Args:
        folder: with ``config.json`` and ``model.safetensors``, of a FocalNet.
    Returns: the module, in training mode; a backbone has no output norms.
    Raises: ValueError if the folder holds no FocalNet, or one of other definitions than ours.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read: {error}.") from error
    if config.get("model_type") != "focalnet":
        raise ValueError(f"{folder} holds a {config.get('model_type')}, not a focalnet.")
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{folder}: {name} must be {value}, got {config[name]}.")
    values = DEFAULTS | config
    arguments = {ours: values[theirs] for theirs, ours in FIELDS.items()}
    scale = float(values["layerscale_value"]) if values["use_layerscale"] else None
    backbone = FocalNet(**arguments, layer_scale=scale, output_norm=False)
    state = read_state_dict(folder / WEIGHTS)
    architecture = next(iter(config.get("architectures") or ()), BACKBONE)
    if architecture == CLASSIFIER:
        net: Classifier | MaskedImageModel = Classifier(backbone, len(state["classifier.weight"]))
    elif architecture == MASKED_IMAGES:
        net = MaskedImageModel(backbone)
    else:
        load_pretrained(backbone, state)
        return backbone
    load_headed(net, state, new_classes=False)
    return net
