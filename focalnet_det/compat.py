"""Handle every difference between library versions; no other module tests versions.

Two versions of Detectron2 are supported: v0.6 as `tools/install_detectron2.py` installs it, and a
build of the main branch. Importing this module imports neither Detectron2 nor torch.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from detectron2.layers import ShapeSpec
    from detectron2.structures import ImageList
    from torch import Tensor, nn

Call = TypeVar("Call", bound=Callable[..., Any])

INSTALL_HINT = "run `make install`, or `python tools/install_detectron2.py` from a checkout"


def renamed(function: Call, old: str, new: str) -> Call:
    """Wrap a function under its old name: each call warns that it was renamed.

    Args:
        function: the function to call.
        old, new: qualified names, module included.
    """

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        warnings.warn(f"{old} is now {new}.", DeprecationWarning, stacklevel=2)
        return function(*arguments, **options)

    return cast(Call, call)


def package_folder(name: str) -> Path | None:
    """Locate an installed package without importing it; return its folder, None if it is absent.

    A folder without `__init__.py`, such as a clone beside the script, is not a package.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent


@functools.cache
def require_detectron2() -> None:
    """Check that a usable Detectron2 is installed, without importing it.

    Raises: ImportError if it is absent, or is an unpatched v0.6 that this NumPy breaks.
    """
    folder = package_folder("detectron2")
    if folder is None:
        raise ImportError(f"This part of focalnet_det needs Detectron2: {INSTALL_HINT}.")
    if uses_removed_numpy_aliases(folder):
        raise ImportError(
            f"The Detectron2 v0.6 in {folder} uses names that NumPy 1.24 removed (np.int): "
            "replace it with `python tools/install_detectron2.py --force`, or install numpy<1.24."
        )


def require_timm(module: str) -> Any:
    """Import a module of timm, such as "data".

    Raises: ImportError that says how to install it.
    """
    try:
        return importlib.import_module(f"timm.{module}")
    except ImportError as error:
        raise ImportError(
            "Augmentation and mixing of the classification recipes are timm's: install it with "
            "pip install timm."
        ) from error


def uses_removed_numpy_aliases(folder: Path) -> bool:
    """Tell whether a Detectron2 is the unpatched v0.6 and NumPy no longer has np.int."""
    source = folder / "data" / "build.py"
    if not source.is_file() or not re.search(r"\bnp\.int\b", source.read_text(encoding="utf-8")):
        return False
    import numpy as np

    return not hasattr(np, "int")


def apply_shims() -> None:
    """Make the installed Detectron2 run on the installed libraries; may be called repeatedly.

    Raises: ImportError as `require_detectron2` does.
    """
    require_detectron2()
    silence_import_warnings()
    fill_pillow_linear()
    import_model_zoo()


def silence_import_warnings() -> None:
    """Hide the one warning that importing Detectron2 and fvcore repeats on torch >= 2.10."""
    warnings.filterwarnings("ignore", r".*torch\.jit\.script.* is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", r".*torch\.jit\.script.* is deprecated", DeprecationWarning)


def fill_pillow_linear() -> None:
    """Restore ``PIL.Image.LINEAR``, which v0.6 reads and Pillow 10 removed."""
    from PIL import Image

    if not hasattr(Image, "LINEAR"):
        Image.LINEAR = Image.BILINEAR  # type: ignore[attr-defined]


def import_model_zoo() -> None:
    """Import Detectron2's model zoo where setuptools >= 82 no longer brings pkg_resources."""
    absent = "pkg_resources" not in sys.modules and not importlib.util.find_spec("pkg_resources")
    if absent:
        with stand_in_pkg_resources():
            importlib.import_module("detectron2.model_zoo")


@contextlib.contextmanager
def stand_in_pkg_resources() -> Iterator[None]:
    """Provide the one function of pkg_resources that the model zoo calls, within the block.

    Afterwards other libraries must still see that the real package is absent.
    """
    stand_in = types.ModuleType("pkg_resources")
    stand_in.resource_filename = resource_filename  # type: ignore[attr-defined]
    sys.modules["pkg_resources"] = stand_in
    try:
        yield
    finally:
        sys.modules.pop("pkg_resources", None)


def resource_filename(package: str, name: str) -> str:
    """Return the path of a file inside an installed package.

    Raises: ModuleNotFoundError if the package is absent.
    """
    folder = package_folder(package)
    if folder is None:
        raise ModuleNotFoundError(f"No package named {package!r}.")
    return str(folder / name)


def create_ddp_model(model: "nn.Module", **options: Any) -> "nn.Module":
    """Wrap a model for data-parallel training, on CPUs too; a single process gets it unchanged.

    Detectron2's function passes a GPU index for models on the CPU as well.

    Args:
        model: already on its device.
        options: arguments of ``DistributedDataParallel``, and Detectron2's ``fp16_compression``.
    """
    defaults: Any = importlib.import_module("detectron2.engine.defaults")
    if not any(parameter.is_cuda for parameter in model.parameters()):
        options.setdefault("device_ids", None)
    wrapped: nn.Module = defaults.create_ddp_model(model, **options)
    return wrapped


def find_fully_shard() -> Callable[..., Any] | None:
    """Return ``torch.distributed.fsdp.fully_shard``, None in PyTorch before 2.6."""
    return getattr(importlib.import_module("torch.distributed.fsdp"), "fully_shard", None)


def create_local_process_group(processes_per_machine: int) -> None:
    """Tell Detectron2 which processes share a machine, if it did not launch them itself.

    Call it once in every process, after `torch.distributed` is initialized. Ranks must be
    consecutive on each machine, as torchrun numbers them.

    Args:
        processes_per_machine: equal on every machine.
    """
    comm: Any = importlib.import_module("detectron2.utils.comm")
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(processes_per_machine)
        return
    from torch import distributed

    for first in range(0, distributed.get_world_size(), processes_per_machine):
        ranks = list(range(first, first + processes_per_machine))
        group = distributed.new_group(ranks)
        if distributed.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def feature_shape(channels: int, stride: int) -> "ShapeSpec":
    """Return the shape of a feature map: a named tuple in v0.6, a dataclass in main."""
    from detectron2.layers import ShapeSpec

    return ShapeSpec(channels=channels, stride=stride)


def dense_head_norm(name: str) -> Callable[[int], "nn.Module"]:
    """Return the constructor of a norm for Detectron2's dense heads.

    v0.6 tests the norm of a dense head with one channel, which GroupNorm now refuses.

    Args:
        name: as in Detectron2's ``get_norm``.
    """

    def norm(channels: int) -> "nn.Module":
        from detectron2.layers import get_norm
        from torch import nn

        return nn.Identity() if channels == 1 else get_norm(name, channels)

    return norm


def has_padding_constraints() -> bool:
    """Tell whether this Detectron2 supports padding constraints (main does, v0.6 does not)."""
    from detectron2.structures import ImageList

    return "padding_constraints" in inspect.signature(ImageList.from_tensors).parameters


def make_image_list(
    tensors: "Sequence[Tensor]",
    size_divisibility: int = 0,
    padding_constraints: Mapping[str, int] | None = None,
) -> "ImageList":
    """Batch images of different sizes, padded with zeros at the right and the bottom.

    Args:
        tensors: images (C, H, W) of any size.
        size_divisibility: height and width of the batch are padded to a multiple of this, pixels;
            0 or 1 for any size.
        padding_constraints: those of a backbone: its `size_divisibility` takes precedence, and a
            positive `square_size` (pixels) makes the batch square.
    Returns: the batch, (N, C, H, W), with the size of each image.
    Raises: ValueError if an image is larger than `square_size`.
    """
    from detectron2.structures import ImageList

    constraints = dict(padding_constraints or {})
    divisibility = constraints.get("size_divisibility", size_divisibility)
    square = constraints.get("square_size", 0)
    largest = max(max(tensor.shape[-2:]) for tensor in tensors)
    if 0 < square < largest:
        raise ValueError(
            f"An image has a side of {largest} pixels, but the backbone accepts squares of "
            f"{square}: use a smaller test size."
        )
    if has_padding_constraints():
        return ImageList.from_tensors(list(tensors), divisibility, padding_constraints=constraints)
    if square > 0:
        # No side exceeds the square, so padding to a multiple of it gives the square itself.
        step = max(divisibility, 1)
        divisibility = -(-square // step) * step
    return ImageList.from_tensors(list(tensors), divisibility)
