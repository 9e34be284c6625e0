"""The values that the constructor of FocalNet takes.

Upper limits are far above every published network. They catch values that would fill the memory,
or that mean something else, such as an image size given as a focal window.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..layers.checks import check_flag, check_integer, check_integers, check_number

MAX_CHANNELS = 8192  # of the last stage
MAX_DEPTH = 500
MAX_LEVELS = 16
MAX_KERNEL = 255
FLAGS = (
    "conv_embed", "post_norm", "post_norm_in_modulation", "normalize_modulator", "output_norm",
    "activation_checkpointing", "lean_training", "valid_context",
)  # fmt: skip


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Check the arguments of FocalNet's constructor, apart from what depends on the stages' names.

    Raises: ValueError that names the argument, its value and what is allowed.
    """
    depths = arguments["depths"]
    check_stages(depths, arguments["focal_levels"], arguments["focal_windows"])
    check_integer("in_channels", arguments["in_channels"], 1, MAX_CHANNELS)
    check_integer("embed_dim", arguments["embed_dim"], 1, MAX_CHANNELS // 2 ** (len(depths) - 1))
    mlp_ratio = arguments["mlp_ratio"]
    check_number("mlp_ratio", mlp_ratio, 0, 64)
    if int(arguments["embed_dim"] * mlp_ratio) < 1:
        raise ValueError(
            f"mlp_ratio must give the MLPs of the first stage one hidden channel or more: at least "
            f"1 / {arguments['embed_dim']}, got {mlp_ratio!r}."
        )
    for name in ("drop_rate", "drop_path_rate"):
        check_number(name, arguments[name], 0, 1, below=True)
    if arguments["layer_scale"] is not None:
        check_number("layer_scale", arguments["layer_scale"], -1e3, 1e3)
    check_integer("patch_size", arguments["patch_size"], 1, 256)
    # More than half of the stem's kernel of 7 would give outputs that see padding alone.
    check_integer("stem_padding", arguments["stem_padding"], 0, 3)
    for name in FLAGS:
        check_flag(name, arguments[name])


def check_stages(
    depths: Sequence[int], focal_levels: Sequence[int], focal_windows: Sequence[int]
) -> None:
    """Check what is given for each stage.

    Raises: ValueError that names the argument, its value and what is allowed.
    """
    lists = {"depths": depths, "focal_levels": focal_levels, "focal_windows": focal_windows}
    for name, values in lists.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not len(values):
            raise ValueError(f"{name} must be a list with one entry per stage, got {values!r}.")
    if not len(depths) == len(focal_levels) == len(focal_windows):
        raise ValueError(
            "depths, focal_levels and focal_windows need one entry per stage, got "
            f"{len(depths)}, {len(focal_levels)} and {len(focal_windows)} entries."
        )
    check_integers("depths", depths, 1, MAX_DEPTH)
    check_integers("focal_levels", focal_levels, 0, MAX_LEVELS)
    check_integers("focal_windows", focal_windows, 1, MAX_KERNEL)
    if any(window % 2 == 0 for window in focal_windows):
        raise ValueError(f"focal_windows must be odd, got {tuple(focal_windows)}.")
    for level, window in zip(focal_levels, focal_windows, strict=True):
        if window + 2 * (level - 1) > MAX_KERNEL:
            raise ValueError(
                f"focal_windows {tuple(focal_windows)} with focal_levels {tuple(focal_levels)} "
                f"give a kernel of {window + 2 * (level - 1)}, but at most {MAX_KERNEL} is allowed."
            )
