"""A block with random parameters, for tests of the paths."""

from torch import nn

from focalnet_det.backbones.focalnet import FocalNetBlock


def block(levels: int = 2, window: int = 3, dim: int = 8, **flags: object) -> FocalNetBlock:
    """In eval mode, with parameters of a size that shows in the result."""
    arguments = {
        "mlp_ratio": 4.0,
        "post_norm": False,
        "post_norm_in_modulation": False,
        "layer_scale": None,
        "normalize_modulator": False,
        "drop_rate": 0.0,
        "drop_path_rate": 0.0,
    }
    module = FocalNetBlock(dim, focal_level=levels, focal_window=window, **arguments | flags)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.3)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return module.eval()
