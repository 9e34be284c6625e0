"""Read checkpoint files without executing their content; write them atomically."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..atomic import replacing
from .reader.formats import describe_non_checkpoint
from .reader.pickled import NOT_WEIGHTS, Content, as_tensor, read_pickles, read_zip
from .reader.raw import LOCAL_MAGIC
from .reader.unpickle import Placeholder

# Keys under which files store their state dict; self-distillation stores that of its teacher.
CONTAINERS = ("model", "state_dict", "model_state_dict", "module", "teacher", "ema_model")
# Prefixes that wrappers such as DistributedDataParallel, torch.compile and Lightning add to names.
WRAPPERS = ("module.", "_orig_mod.", "model.", "teacher.")
# PyTorch's name for state of a module that is not a tensor.
EXTRA_STATE = "_extra_state"
# Names of the training progress in files of various trainers.
PROGRESS = ("epoch", "iteration", "iter", "step", "global_step")


@dataclass
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        tensors: tensors by name, without containers and wrappers.
        origin: path of the file, for messages.
        containers: keys that led to the tensors.
        progress: training progress in the file, such as {"epoch": 299}.
        ignored: classes and functions that the file names in addition to tensors; not read.
    """

    tensors: dict[str, Tensor]
    origin: str
    containers: tuple[str, ...] = ()
    progress: dict[str, int] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file of torch.save or safetensors on the CPU, without executing its content.

    Tensors, arrays and plain containers are read. Anything else, such as the config and the log in
    files of mmdet, is ignored; see :mod:`.unpickle`. All checksums are verified.

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
        raise ValueError(f"Could not read {path}: {empty[0]} has a shape but no data.")
    return checkpoint


def check_file(path: str | Path) -> str | None:
    """Check that a file can be read as a checkpoint, without executing its content.

    All checksums of a zip file of torch.save are verified, at the speed of reading it. Files of
    safetensors, and of torch.save before PyTorch 1.6, have none: their structure is verified.

    Args:
        path: file of torch.save or safetensors.
    Returns: None if the file is intact; otherwise a phrase for "Could not read FILE: ...", such as
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

    Raises: ValueError with a phrase for "Could not read FILE: ...".
    """
    problem = describe_non_checkpoint(path)
    if problem is not None:
        raise ValueError(problem)
    with path.open("rb") as file:
        start = file.read(16)
    # safetensors begins with a length of eight bytes and a JSON object.
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
    """Extract the state dict from the content of a file, without its containers and wrappers.

    Args:
        content: content of the file.
        origin: path of the file, for messages.
    Raises: ValueError if there is no state dict, or its tensors are not dense tensors with data.
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
        raise ValueError(f"{origin} contains no state dict.")
    for name, tensor in tensors.items():
        _check_dense(name, tensor, origin)
    return Checkpoint(_without_wrappers(tensors), origin, tuple(containers), progress)


def _tensors_in(content: Mapping[Any, Any], origin: str, *, bare: bool) -> dict[str, Tensor]:
    """Return the tensors among the entries of a file, or of a container in it.

    Raises: ValueError if an entry that cannot be read may be a weight.
    """
    tensors = {}
    for name, value in content.items():
        tensor = as_tensor(value)
        if tensor is not None:
            tensors[str(name)] = tensor
        elif isinstance(value, Placeholder) and value.name in NOT_WEIGHTS:
            raise ValueError(f"{origin}: {name} is {NOT_WEIGHTS[value.name]}.")
        elif isinstance(value, Placeholder) and not bare and not str(name).endswith(EXTRA_STATE):
            raise ValueError(
                f"{origin}: {name} is not a tensor but a {value.name}, which cannot be read."
            )
    return tensors


def _progress(content: Mapping[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for level in (content, content.get("meta"), content.get("__metadata__")):
        if isinstance(level, Mapping):
            found |= {k: int(level[k]) for k in PROGRESS if str(level.get(k, "")).isdecimal()}
    return found


def _check_dense(name: str, tensor: Tensor, origin: str) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"{origin}: {name} is sparse or quantized; weights must be dense.")
    # An expanded tensor has fewer elements in memory than its shape says.
    held = tensor.untyped_storage().nbytes()
    if not tensor.is_meta and held < tensor.numel() * tensor.element_size():
        raise ValueError(f"{origin}: {name} declares more elements than the file contains.")


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
    """Write tensors atomically; see :func:`focalnet_det.atomic.replacing`.

    Args:
        path: file; the suffix ``.safetensors`` selects safetensors, any other torch.save.
        tensors: tensors by name.
        container: key under which torch.save stores them, None for none.
    Raises: OSError if the file cannot be written; an existing file is not changed. ValueError for a
        dtype that safetensors does not support.
    """
    path = Path(path)
    # A view would be saved with the whole storage that it is a part of.
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        with replacing(path) as temporary:
            if path.suffix == ".safetensors":
                # transformers requires this entry.
                save_file(whole, temporary, metadata={"format": "pt"})
            else:
                torch.save(whole if container is None else {container: whole}, temporary)
    except KeyError as error:
        name = next(n for n, t in whole.items() if t.dtype == error.args[0])
        raise ValueError(f"safetensors has no dtype for {name}, {error}: use .pth.") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"Could not write {path}: {error}.") from error
