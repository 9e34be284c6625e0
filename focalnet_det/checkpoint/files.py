"""Reading checkpoint files without running what is in them; writing them whole or not at all."""

import json
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .whole import check_file

# Where a file keeps its tensors; the teacher is what self-distillation keeps.
CONTAINERS = ("model", "state_dict", "model_state_dict", "module", "teacher", "ema_model")
# What wrappers put before every name: DistributedDataParallel, torch.compile, Lightning.
WRAPPERS = ("module.", "_orig_mod.", "model.", "teacher.")
# Progress of training, as the various trainers name it.
PROGRESS = ("epoch", "iteration", "iter", "step", "global_step")
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
MAX_HEADER = 100_000_000


@dataclass
class Checkpoint:
    """A file of tensors.

    Attributes:
        tensors: by name, without containers and wrappers.
        origin: the file, for messages.
        containers: keys that led to the tensors.
        progress: such as {"epoch": 299}, where the file says so.
    """

    tensors: dict[str, Tensor]
    origin: str
    containers: tuple[str, ...] = ()
    progress: dict[str, int] = field(default_factory=dict)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a file of torch.save or of safetensors, on the CPU.

    Nothing but tensors and plain containers is unpickled, so a file cannot run code. Before that,
    its declared sizes are held against its real ones, and its checksums are verified.

    Args:
        path: file, or a folder of Hugging Face's ``save_pretrained``.
    Raises: ValueError if the file is missing, damaged, or holds anything else.
    """
    path = _file_in(Path(path))
    problem = check_file(path)
    if problem is not None:
        raise ValueError(f"Could not read {path}: {problem}.")
    with path.open("rb") as file:
        start = file.read(16)
    if path.suffix == ".safetensors" or (len(start) > 8 and start[8:10] == b'{"'):
        return unwrap(_read_safetensors(path), str(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise almost anything
        raise ValueError(
            f"Could not read {path} as a file of tensors: it is damaged, or holds Python objects, "
            "which are never loaded because they can run code. Save its state dict alone with "
            f"torch.save(model.state_dict(), ...) where it was made. ({_first_line(error)})"
        ) from error
    checkpoint = unwrap(content, str(path))
    empty = [name for name, tensor in checkpoint.tensors.items() if tensor.is_meta]
    if empty:
        raise ValueError(f"Could not read {path}: {empty[0]} has a shape and no numbers.")
    return checkpoint


def _file_in(path: Path) -> Path:
    if path.is_dir():
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (path / name).is_file():
                return path / name
    if not path.is_file():
        raise ValueError(f"No such checkpoint: {path}.")
    return path


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Tensors and, under "__metadata__", text; the tensors share a private mapping of the file."""
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        header, start = _safetensors_header(content)
        metadata = header.pop("__metadata__", {})
        tensors = {name: _one_tensor(content, start, row) for name, row in header.items()}
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if held != len(content) - start:
            raise ValueError(f"its tensors have {held:,} bytes of {len(content) - start:,}")
    except Exception as error:  # damaged headers raise almost anything
        raise ValueError(f"Could not read {path}: it is damaged ({_first_line(error)}).") from error
    return {**tensors, "__metadata__": metadata}


def _safetensors_header(content: mmap.mmap) -> tuple[dict[str, Any], int]:
    (length,) = struct.unpack("<Q", content[:8])
    if length > min(len(content) - 8, MAX_HEADER):
        raise ValueError(f"its header declares {length:,} bytes, the file has {len(content):,}")
    header = json.loads(content[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    return header, 8 + length


def _one_tensor(content: mmap.mmap, start: int, row: dict[str, Any]) -> Tensor:
    if row["dtype"] not in SAFETENSORS_DTYPES:
        raise ValueError(f"its dtype {row['dtype']!r} is none that weights have")
    dtype, shape = SAFETENSORS_DTYPES[row["dtype"]], [int(n) for n in row["shape"]]
    begin, end = (int(n) for n in row["data_offsets"])
    count = 1
    for n in shape:
        count *= n
    if min([begin, *shape]) < 0 or end - begin != count * dtype.itemsize:
        raise ValueError("a shape does not fit its bytes")
    if start + end > len(content):
        raise ValueError("it is cut off")
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=start + begin).reshape(shape)


def unwrap(content: Any, origin: str) -> Checkpoint:
    """The state dict inside what a file holds, without its containers and wrappers.

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
    tensors = (
        {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        raise ValueError(f"{origin} holds no state dict.")
    for name, tensor in tensors.items():
        _check_dense(name, tensor, origin)
    return Checkpoint(_without_wrappers(tensors), origin, tuple(containers), progress)


def _progress(content: Mapping[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for level in (content, content.get("meta"), content.get("__metadata__")):
        if isinstance(level, Mapping):
            found |= {k: int(level[k]) for k in PROGRESS if str(level.get(k, "")).isdecimal()}
    return found


def _check_dense(name: str, tensor: Tensor, origin: str) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"{origin}: {name} is sparse or quantised, weights are dense.")
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
    """Tensors of a checkpoint file, by name; see :func:`read_checkpoint`."""
    return read_checkpoint(path).tensors


def write_state_dict(
    path: str | Path, tensors: Mapping[str, Tensor], container: str | None = None
) -> None:
    """Writes tensors to a temporary name, then renames it.

    Args:
        path: ``.safetensors``, or anything else for torch.save.
        container: key under which torch.save's file keeps them, None for none.
    Raises: OSError with the path if it cannot be written; what was there stays.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    # Views of a larger storage would be saved with all of it.
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            if path.suffix == ".safetensors":
                for chunk in _safetensors_bytes(whole):
                    file.write(chunk)
            else:
                torch.save(whole if container is None else {container: whole}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise OSError(f"Could not write {path}: {error}.") from error
    finally:
        # Nothing is there after the renaming.
        temporary.unlink(missing_ok=True)


def _safetensors_bytes(tensors: Mapping[str, Tensor]) -> Iterable[bytes]:
    """Header and data; larger elements first, so that all are aligned."""
    # "pt" is what transformers demands of a file.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in SAFETENSORS_NAMES:
            raise ValueError(f"safetensors has no dtype for {name}, which is {tensor.dtype}.")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        yield tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
