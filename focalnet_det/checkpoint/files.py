"""Read checkpoint files without running what is in them; write them whole or not at all."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import replacing
from .reader.formats import describe_foreign
from .reader.pickled import UNFIT, Content, as_tensor, read_pickles, read_zip
from .reader.raw import LOCAL_MAGIC
from .reader.unpickle import Placeholder

# Where a file keeps its tensors; the teacher is what self-distillation keeps.
CONTAINERS = ("model", "state_dict", "model_state_dict", "module", "teacher", "ema_model")
# What wrappers put before every name: DistributedDataParallel, torch.compile, Lightning.
WRAPPERS = ("module.", "_orig_mod.", "model.", "teacher.")
# What modules may keep beside their tensors; PyTorch's name for it.
EXTRA_STATE = "_extra_state"
# Progress of training, as the various trainers name it.
PROGRESS = ("epoch", "iteration", "iter", "step", "global_step")


@dataclass
class Checkpoint:
    """A file of tensors.

    Attributes:
        tensors: by name, without containers and wrappers.
        origin: the file, for messages.
        containers: keys that led to the tensors.
        progress: such as {"epoch": 299}, where the file says so.
        ignored: classes and functions that the file names beside its tensors; they were left out.
    """

    tensors: dict[str, Tensor]
    origin: str
    containers: tuple[str, ...] = ()
    progress: dict[str, int] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file of torch.save or of safetensors on the CPU, running nothing that is in it.

    Tensors, arrays and plain containers are read; whatever else a file holds, such as the config
    and the log of mmdet's, is left out, see :mod:`.unpickle`. All checksums are verified.

    Args:
        path: file, or a folder of Hugging Face's ``save_pretrained``.
    Raises: ValueError if the file is missing, damaged, of another kind, or has no state dict.
    """
    path = _file_in(Path(path))
    try:
        content = _read_content(path)
    except ValueError as error:
        raise ValueError(f"Could not read {path}: {error}.") from error
    checkpoint = unwrap(content.tree, str(path))
    checkpoint.ignored = tuple(content.ignored)
    empty = [name for name, tensor in checkpoint.tensors.items() if tensor.is_meta]
    if empty:
        raise ValueError(f"Could not read {path}: {empty[0]} has a shape and no numbers.")
    return checkpoint


def check_file(path: str | Path) -> str | None:
    """Say in a phrase why a file cannot be read as a checkpoint; run nothing that is in it.

    All checksums of a zip file of torch.save are verified, at the speed of reading it. Files of
    safetensors and of torch.save before PyTorch 1.6 have none: their structure is verified.

    Args:
        path: file of torch.save or safetensors.
    Returns: None if it is whole; otherwise a phrase for "Could not read FILE: ...", such as
        "it is cut off" or "the checksum of archive/data/3 is wrong".
    """
    path = Path(path)
    try:
        if not path.is_file():
            return "it is a folder" if path.is_dir() else "there is no such file"
        _read_content(path)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be opened: {error.strerror or error}"
    return None


def _read_content(path: Path) -> Content:
    """Read a file of any known format.

    Raises: ValueError with a phrase that says what is wrong with the file.
    """
    foreign = describe_foreign(path)
    if foreign is not None:
        raise ValueError(foreign)
    with path.open("rb") as file:
        start = file.read(16)
    # Eight bytes of length, then a table.
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    return read_zip(path) if start.startswith(LOCAL_MAGIC) else read_pickles(path)


def _read_safetensors(path: Path) -> Content:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Content({**tensors, "__metadata__": file.metadata() or {}})
    except (SafetensorError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"it is damaged or cut off ({error})") from error


def _file_in(path: Path) -> Path:
    if path.is_dir():
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (path / name).is_file():
                return path / name
    if not path.is_file():
        raise ValueError(f"No such checkpoint: {path}.")
    return path


def unwrap(content: Any, origin: str) -> Checkpoint:
    """Return the state dict inside what a file holds, without its containers and wrappers.

    Raises: ValueError if there is none, or if its tensors are not dense tensors in memory.
    """
    containers: list[str] = []
    progress: dict[str, int] = {}
    while isinstance(content, Mapping) and len(containers) < 8:
        progress |= _progress(content)
        key = next((k for k in CONTAINERS if isinstance(content.get(k), Mapping)), None)
        if key is None:
            break
        containers.append(key)
        content = content[key]
    tensors = {}
    if isinstance(content, Mapping):
        tensors = _tensors_in(content, origin, bare=not containers)
    if not tensors:
        raise ValueError(f"{origin} holds no state dict.")
    for name, tensor in tensors.items():
        _check_dense(name, tensor, origin)
    return Checkpoint(_without_wrappers(tensors), origin, tuple(containers), progress)


def _tensors_in(content: Mapping[Any, Any], origin: str, *, bare: bool) -> dict[str, Tensor]:
    """Return the tensors among the entries of a file, or of a container in it.

    Raises: ValueError if something that is not built may stand in the place of a weight.
    """
    tensors = {}
    for name, value in content.items():
        tensor = as_tensor(value)
        if tensor is not None:
            tensors[str(name)] = tensor
        elif isinstance(value, Placeholder) and value.name in UNFIT:
            raise ValueError(f"{origin}: {name} is {UNFIT[value.name]}.")
        elif isinstance(value, Placeholder) and not bare and not str(name).endswith(EXTRA_STATE):
            raise ValueError(f"{origin}: {name} is no tensor but {value.name}, which is not built.")
    return tensors


def _progress(content: Mapping[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for level in (content, content.get("meta"), content.get("__metadata__")):
        if isinstance(level, Mapping):
            found |= {k: int(level[k]) for k in PROGRESS if str(level.get(k, "")).isdecimal()}
    return found


def _check_dense(name: str, tensor: Tensor, origin: str) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"{origin}: {name} is sparse or quantized, weights are dense.")
    # An expanded tensor has fewer numbers than it says. (A caller's dict may be on meta.)
    held = tensor.untyped_storage().nbytes()
    if not tensor.is_meta and held < tensor.numel() * tensor.element_size():
        raise ValueError(f"{origin}: {name} declares more numbers than are in the file.")


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while True:
        wrapper = next((w for w in WRAPPERS if all(n.startswith(w) for n in tensors)), None)
        if wrapper is None:
            return tensors
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint file, by name; see :func:`read_checkpoint`."""
    return read_checkpoint(path).tensors


def write_state_dict(
    path: str | Path, tensors: Mapping[str, Tensor], container: str | None = None
) -> None:
    """Write tensors, whole or not at all; see :func:`focalnet_det.atomic.replacing`.

    Args:
        path: ``.safetensors``, or anything else for torch.save.
        container: key under which torch.save's file keeps them, None for none.
    Raises: OSError with the path if it cannot be written; what was there stays. ValueError for a
        dtype that safetensors lacks.
    """
    path = Path(path)
    # Views of a larger storage would be saved with all of it.
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        with replacing(path) as temporary:
            if path.suffix == ".safetensors":
                # "pt" is what transformers demands of a file.
                save_file(whole, temporary, metadata={"format": "pt"})
            else:
                torch.save(whole if container is None else {container: whole}, temporary)
    except KeyError as error:
        name = next(n for n, t in whole.items() if t.dtype == error.args[0])
        raise ValueError(f"safetensors has no dtype for {name}, {error}.") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"Could not write {path}: {error}.") from error
