"""Read files of torch.save, and plain pickles of arrays, without executing their content.

Tensors share a private mapping of the file, so only what is used is read from the disk.
Source: pytorch/pytorch:torch/serialization.py and torch/_utils.py for both formats.
"""

import mmap
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .formats import describe_non_checkpoint_zip
from .raw import LEGACY, entry_start, map_file, read_pickle
from .unpickle import Constructor, Placeholder, Unpickler

# torch.save does not compress: a file that inflates more than this is an attack.
MAX_INFLATION = 20
# Size of the steps of decompression, bytes.
STEP = 1 << 20
STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
}
UNTYPED = torch.uint8
# Function that would build a tensor -> why the tensor cannot be a weight.
NOT_WEIGHTS = {
    "torch._utils._rebuild_sparse_tensor": "sparse; weights must be dense",
    "torch._utils._rebuild_nested_tensor": "nested; weights must be dense",
    "torch._utils._rebuild_qtensor": "quantized; weights must be dense",
    "torch._utils._rebuild_meta_tensor_no_storage": "a shape without data",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of a custom class",
}


@dataclass
class Content:
    """The decoded content of a file.

    Attributes:
        tree: plain containers, tensors, arrays and placeholders.
        ignored: globals that became placeholders.
    """

    tree: Any
    ignored: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Storage:
    """A storage of torch.save, as a flat tensor (n,)."""

    flat: Tensor


def read_zip(path: Path) -> Content:
    """Read a file of torch.save since PyTorch 1.6, and verify all its checksums.

    Raises: ValueError with a phrase for "Could not read FILE: ..." if it is not intact.
    """
    size = path.stat().st_size
    try:
        content = map_file(path)
        with zipfile.ZipFile(path) as archive:
            problem = describe_non_checkpoint_zip(archive)
            if problem is not None:
                raise ValueError(problem)
            entries = {entry.filename: entry for entry in archive.infolist()}
            declared = sum(entry.file_size for entry in archive.infolist())
            if declared > MAX_INFLATION * size:
                raise ValueError(f"it has {size:,} bytes and declares {declared:,}")
            for entry in archive.infolist():
                _check_entry(content, entry)
            return _ZipReader(archive, content, entries).read()
    except zipfile.BadZipFile:
        # The list of entries is at the end of the file.
        raise ValueError("it is cut off") from None
    except (NotImplementedError, EOFError, RuntimeError, KeyError, zlib.error) as error:
        raise ValueError(f"it is damaged ({error})") from None


def _check_entry(content: mmap.mmap, entry: zipfile.ZipInfo) -> None:
    """Check size and checksum of a zip entry.

    Raises: ValueError if they differ from those in its header.
    """
    start = entry_start(content, entry)
    with memoryview(content)[start : start + entry.compress_size] as data:
        if entry.compress_type == zipfile.ZIP_STORED:
            length, checksum = len(data), zlib.crc32(data)
        elif entry.compress_type == zipfile.ZIP_DEFLATED:
            length, checksum = _inflated_checksum(data, entry.file_size)
        else:
            raise ValueError(f"{entry.filename} has a compression that torch.save does not use")
    if length != entry.file_size:
        raise ValueError(f"{entry.filename} does not have its declared size")
    if checksum != entry.CRC:
        raise ValueError(f"the checksum of {entry.filename} is wrong")


def _inflated_checksum(data: memoryview, declared: int) -> tuple[int, int]:
    """Return size and checksum of compressed data; stop beyond the declared size."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    length, checksum, rest = 0, 0, bytes(data)
    while not unpacker.eof and length <= declared:
        block = unpacker.decompress(rest, STEP)
        rest = unpacker.unconsumed_tail
        length, checksum = length + len(block), zlib.crc32(block, checksum)
        if not block and not rest:
            break
    return length, checksum


class _ZipReader:
    """Decoder of the pickle in an archive; its storages are other entries of the archive."""

    def __init__(
        self, archive: zipfile.ZipFile, content: mmap.mmap, entries: dict[str, zipfile.ZipInfo]
    ) -> None:
        self.archive, self.content, self.entries = archive, content, entries
        main = min((n for n in entries if n.rpartition("/")[2] == "data.pkl"), key=len)
        self.prefix = main.removesuffix("data.pkl")
        order = f"{self.prefix}byteorder"
        self.swapped = order in entries and archive.read(order) == b"big"
        self.storages: dict[str, _Storage] = {}

    def read(self) -> Content:
        pickled = self.archive.read(f"{self.prefix}data.pkl")
        unpickler = Unpickler(pickled, TENSOR_CONSTRUCTORS, self.storage)
        return Content(unpickler.decode(), list(unpickler.ignored))

    def storage(self, pid: Any) -> _Storage:
        dtype, key, count = _storage_id(pid)
        if key not in self.storages:
            self.storages[key] = _Storage(self._read_elements(dtype, key, count))
        return _reuse_storage(self.storages[key], dtype, count)

    def _read_elements(self, dtype: torch.dtype, key: str, count: int) -> Tensor:
        entry = self.entries.get(f"{self.prefix}data/{key}")
        if entry is None:
            raise ValueError(f"its data {key} is missing")
        if count * dtype.itemsize > entry.file_size:
            size = len(self.content)
            raise ValueError(f"it has {size:,} bytes and declares {count:,} elements")
        if entry.compress_type == zipfile.ZIP_STORED:
            flat = _read_elements(self.content, entry_start(self.content, entry), dtype, count)
        else:
            flat = _read_elements(bytearray(self.archive.read(entry)), 0, dtype, count)
        return _byteswapped(flat) if self.swapped and dtype.itemsize > 1 else flat


def _reuse_storage(storage: _Storage, dtype: torch.dtype, count: int) -> _Storage:
    """Return a storage that is referred to again.

    Raises: ValueError if dtype or size differ this time, which torch.save never writes.
    """
    if storage.flat.dtype != dtype or len(storage.flat) != count:
        raise ValueError("it is damaged (one storage of two sizes)")
    return storage


def _byteswapped(flat: Tensor) -> Tensor:
    storage = flat.clone().untyped_storage()
    storage.byteswap(flat.dtype)
    return torch.empty(0, dtype=flat.dtype).set_(storage)


def _read_elements(
    content: mmap.mmap | bytearray, start: int, dtype: torch.dtype, count: int
) -> Tensor:
    if count == 0:
        return torch.empty(0, dtype=dtype)
    if start % dtype.itemsize:
        content, start = bytearray(content[start : start + count * dtype.itemsize]), 0
    return torch.frombuffer(content, dtype=dtype, count=count, offset=start)


def _storage_id(pid: Any) -> tuple[torch.dtype, str, int]:
    """Return dtype, key and number of elements of a storage that a pickle refers to.

    Raises: ValueError for whole modules, views of storages and damaged ids.
    """
    if type(pid) is not tuple or len(pid) < 5 or pid[0] != "storage":
        raise ValueError("it contains a whole module, not a state dict")
    dtype, key, count = pid[1], pid[2], pid[4]
    if not isinstance(dtype, torch.dtype) or type(count) is not int or count < 0:
        raise ValueError("it is damaged (the id of a storage)")
    if len(pid) > 5 and pid[5] is not None:
        raise ValueError("it was saved by PyTorch before 0.4: save it again with a newer one")
    return dtype, str(key), count


def read_pickles(path: Path) -> Content:
    """Read a file of torch.save before PyTorch 1.6, or a plain pickle as in Detectron2's model zoo.

    Raises: ValueError as :func:`read_zip`.
    """
    content = map_file(path)
    first = read_pickle(content)
    if first != LEGACY:
        if content.tell() < len(content):
            raise ValueError("it is in no known format, or damaged")
        unpickler = Unpickler(first, TENSOR_CONSTRUCTORS)
        return Content(unpickler.decode(), list(unpickler.ignored))
    read_pickle(content)  # the protocol
    machine = Unpickler(read_pickle(content)).decode()
    if isinstance(machine, dict) and machine.get("little_endian") is False:
        raise ValueError(
            "it was saved on a big-endian machine: save it again with PyTorch 1.6 or newer"
        )
    return _read_legacy(content)


def _read_legacy(content: mmap.mmap) -> Content:
    """Decode the pickle twice: first for the dtypes of its storages, then with their data."""
    pickled = read_pickle(content)
    found: dict[str, _Storage] = {}

    def note(pid: Any) -> _Storage:
        dtype, key, count = _storage_id(pid)
        if count * dtype.itemsize > len(content):
            raise ValueError(f"it has {len(content):,} bytes and declares {count:,} elements")
        row = found.setdefault(key, _Storage(torch.empty(count, dtype=dtype, device="meta")))
        return _reuse_storage(row, dtype, count)

    Unpickler(pickled, TENSOR_CONSTRUCTORS, note).decode()
    keys = Unpickler(read_pickle(content)).decode()
    storages: dict[str, _Storage] = {}
    at = content.tell()
    for key in map(str, keys if isinstance(keys, list) else []):
        if key not in found:
            raise ValueError("it is damaged (data without a tensor)")
        dtype, count = found[key].flat.dtype, len(found[key].flat)
        end = at + 8 + count * dtype.itemsize
        if end > len(content):
            raise ValueError("it is cut off")
        if count != int.from_bytes(content[at : at + 8], "little"):
            raise ValueError("it is damaged (the size of its data)")
        storages[key] = _Storage(_read_elements(content, at + 8, dtype, count))
        at = end
    unpickler = Unpickler(pickled, TENSOR_CONSTRUCTORS, lambda pid: storages[_storage_id(pid)[1]])
    return Content(unpickler.decode(), list(unpickler.ignored))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    """Build a tensor on a storage; the rest are gradients, hooks and metadata."""
    if not isinstance(storage, _Storage):
        return Placeholder("a tensor without data")
    if rest[2:] and rest[2]:
        return Placeholder("a conjugated or negated tensor")
    return storage.flat.as_strided(tuple(size), tuple(stride), offset)


def _untyped_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    """Build a tensor on an untyped storage; its dtype is the third of the rest."""
    dtype = rest[2]
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
        return Placeholder("a tensor without data")
    return _tensor(_Storage(storage.flat.view(dtype)), offset, size, stride, *rest[:2], *rest[3:])


def _subclass_tensor(function: Any, _: Any, arguments: Any, *__: Any) -> Any:
    """Build a tensor of a subclass, or with attributes, as a plain tensor."""
    if isinstance(function, Constructor) and type(arguments) is tuple:
        return function.build(*arguments)
    return Placeholder(getattr(function, "name", "a tensor of a custom class"))


def _first_argument(tensor: Any, *_: Any) -> Any:
    return tensor


def _constructors() -> dict[str, Any]:
    rows: dict[str, Any] = {
        "torch.Size": lambda items=(): tuple(items) if isinstance(items, list | tuple) else (),
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _untyped_tensor,
        "torch._utils._rebuild_parameter": _first_argument,
        "torch._utils._rebuild_parameter_with_state": _first_argument,
        "torch._tensor._rebuild_from_type_v2": _subclass_tensor,
        "torch.storage.UntypedStorage": UNTYPED,
    }
    for name, dtype in STORAGES.items():
        rows |= {f"torch.{name}Storage": dtype, f"torch.cuda.{name}Storage": dtype}
    rows |= {f"torch.{k}": v for k, v in vars(torch).items() if isinstance(v, torch.dtype)}
    return rows


TENSOR_CONSTRUCTORS: dict[str, Callable[..., Any] | torch.dtype] = _constructors()


def as_tensor(value: Any) -> Tensor | None:
    """Return a tensor, or a numeric array as a tensor; None for anything else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        # The copy has native byte order and writable memory.
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
    return None
