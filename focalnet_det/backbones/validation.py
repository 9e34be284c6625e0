"""Check the constructor arguments of the backbones.

Upper limits are far above every published network. They catch values that would exhaust the memory
and mistaken ones, such as an image size passed as a focal window.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..layers.checks import check_flag, check_integer, check_integers, check_number

MAX_CHANNELS = 8192  # of the last stage
MAX_DEPTH = 500
MAX_LEVELS = 16
MAX_KERNEL = 255
MAX_WINDOW = 63  # tokens
MAX_TOKENS = 2**16
FLAGS = (
    "conv_embed", "post_norm", "post_norm_in_modulation", "normalize_modulator", "output_norm",
    "activation_checkpointing", "lean_training", "valid_context",
)  # fmt: skip


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Check the arguments of FocalNet's constructor.

    The backbone itself checks ``out_features`` and ``frozen_stages``, which depend on its stages.

    Args:
        arguments: values of all constructor arguments by name.
    Raises: ValueError that names the argument, its value and what is allowed.
    """
    check_stages(arguments["depths"], arguments["focal_levels"], arguments["focal_windows"])
    if arguments["layer_scale"] is not None:
        check_number("layer_scale", arguments["layer_scale"], -1e3, 1e3)
    check_integer("patch_size", arguments["patch_size"], 1, 256)
    _check_shared(arguments)


def check_transformer_arguments(arguments: Mapping[str, Any]) -> None:
    """Check the arguments of the constructor of a Focal Transformer of either version.

    Args:
        arguments: values of all constructor arguments by name.
    Raises: ValueError that names the argument, its value and what is allowed.
    """
    names = [n for n in ("depths", "num_heads", "focal_windows") if n in arguments]
    _check_lengths({name: arguments[name] for name in names})
    check_integers("depths", arguments["depths"], 1, MAX_DEPTH)
    _check_shared(arguments)
    check_integers("num_heads", arguments["num_heads"], 1, MAX_CHANNELS)
    for stage, heads in enumerate(arguments["num_heads"]):
        channels = arguments["embed_dim"] * 2**stage
        if channels % heads:
            raise ValueError(
                f"num_heads must divide the channels of each stage: stage {stage + 1} has "
                f"{channels} channels, got {heads} heads."
            )
    window = arguments["window_size"]
    check_integer("window_size", window, 3, MAX_WINDOW)
    if window % 2 == 0:
        raise ValueError(f"window_size must be odd, got {window}.")
    if "top_k" in arguments:
        check_integer("top_k", arguments["top_k"], 1, MAX_TOKENS)
    if "expand_size" in arguments:
        # With a wider ring, the four shifts of the published computation leave gaps.
        check_integer("expand_size", arguments["expand_size"], 0, window // 2)
    if "focal_windows" in arguments:
        check_integers("focal_windows", arguments["focal_windows"], 1, MAX_WINDOW)
        _check_odd(arguments["focal_windows"])


def _check_shared(arguments: Mapping[str, Any]) -> None:
    """Check the arguments that all constructors have; ``depths`` must be checked before."""
    last = len(arguments["depths"]) - 1
    check_integer("in_channels", arguments["in_channels"], 1, MAX_CHANNELS)
    check_integer("embed_dim", arguments["embed_dim"], 1, MAX_CHANNELS // 2**last)
    mlp_ratio = arguments["mlp_ratio"]
    check_number("mlp_ratio", mlp_ratio, 0, 64)
    if int(arguments["embed_dim"] * mlp_ratio) < 1:
        raise ValueError(
            f"mlp_ratio must be at least 1 / {arguments['embed_dim']}, so that the MLPs of the "
            f"first stage have a hidden channel, got {mlp_ratio!r}."
        )
    for name in ("drop_rate", "drop_path_rate"):
        check_number(name, arguments[name], 0, 1, below=True)
    # Padding of more than half the stem's kernel of 7 would give outputs that see padding only.
    check_integer("stem_padding", arguments["stem_padding"], 0, 3)
    for name in FLAGS:
        if name in arguments:
            check_flag(name, arguments[name])


def check_stages(
    depths: Sequence[int], focal_levels: Sequence[int], focal_windows: Sequence[int]
) -> None:
    """Check the arguments that have one entry per stage.

    Raises: ValueError that names the argument, its value and what is allowed.
    """
    _check_lengths({"depths": depths, "focal_levels": focal_levels, "focal_windows": focal_windows})
    check_integers("depths", depths, 1, MAX_DEPTH)
    check_integers("focal_levels", focal_levels, 0, MAX_LEVELS)
    check_integers("focal_windows", focal_windows, 1, MAX_KERNEL)
    _check_odd(focal_windows)
    for level, window in zip(focal_levels, focal_windows, strict=True):
        if window + 2 * (level - 1) > MAX_KERNEL:
            raise ValueError(
                f"focal_windows {tuple(focal_windows)} with focal_levels {tuple(focal_levels)} "
                f"give a kernel of {window + 2 * (level - 1)}, but at most {MAX_KERNEL} is allowed."
            )


def _check_lengths(lists: Mapping[str, Any]) -> None:
    """Check that arguments are lists with one entry per stage."""
    for name, values in lists.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not len(values):
            raise ValueError(f"{name} must be a list with one entry per stage, got {values!r}.")
    counts = [str(len(values)) for values in lists.values()]
    if len(set(counts)) > 1:
        raise ValueError(
            f"{_join(list(lists))} need one entry per stage, got {_join(counts)} entries."
        )


def _join(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _check_odd(windows: Sequence[int]) -> None:
    if any(window % 2 == 0 for window in windows):
        raise ValueError(f"focal_windows must be odd, got {tuple(windows)}.")
