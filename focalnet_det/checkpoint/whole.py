"""Tell whether a file of tensors is whole: structure, declared sizes and every checksum."""

import mmap
import pickletools
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .formats import describe_foreign, describe_foreign_zip

# torch.save stores without compression; more than this is no honest file.
MAX_INFLATION = 20
# Of a zip entry: fixed part of the header before its name, and where the lengths are in it.
LOCAL_HEADER, LOCAL_MAGIC = 30, b"PK\x03\x04"
# A step of decompression, bytes.
STEP = 1 << 20


def check_file(path: str | Path) -> str | None:
    """Say in a phrase why a file cannot be read as a checkpoint; run and unpickle nothing.

    All checksums of a zip file of torch.save are verified, at the speed of reading it. Files of
    safetensors and of torch.save before PyTorch 1.6 have none: of them the structure is.

    Args:
        path: file of torch.save or safetensors.
    Returns: None if it is whole; otherwise a phrase for "Could not read FILE: ...", such as
        "it is cut off" or "the checksum of archive/data/3 is wrong".
    """
    path = Path(path)
    try:
        if not path.is_file():
            return "it is a folder" if path.is_dir() else "there is no such file"
        return describe_foreign(path) or _check_content(path)
    except OSError as error:
        return f"it cannot be opened: {error.strerror or error}"


def _check_content(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(16)
    if is_safetensors(path, start):
        return _check_safetensors(path)
    if start.startswith(LOCAL_MAGIC):
        return _check_zip(path)
    return _check_pickles(path)


def is_safetensors(path: Path, start: bytes) -> bool:
    """Tell whether a file that starts so is one of safetensors."""
    # Eight bytes of length, then a table; padded or not.
    return path.suffix == ".safetensors" or start[8:9] == b"{"


@contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """Map a file that is not empty; changes stay in memory."""
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        yield content
    finally:
        # Tensors that share the mapping keep it until they go.
        with suppress(BufferError):
            content.close()


def _check_safetensors(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except SafetensorError as error:
        return f"it is damaged or cut off ({error})"
    return None


def _check_zip(path: Path) -> str | None:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive, mapped(path) as content:
            foreign = describe_foreign_zip(archive)
            if foreign is not None:
                return foreign
            entries = archive.infolist()
            declared = sum(entry.file_size for entry in entries)
            if declared > MAX_INFLATION * size:
                return f"it has {size:,} bytes and declares {declared:,}"
            for entry in entries:
                problem = _check_entry(content, entry)
                if problem is not None:
                    return problem
                if entry.filename.endswith("data.pkl"):
                    problem = _check_storages(archive.read(entry), size)
                    if problem is not None:
                        return problem
    except zipfile.BadZipFile:
        # The list of entries is at the end.
        return "it is cut off"
    except (ValueError, NotImplementedError, EOFError, RuntimeError, zlib.error) as error:
        return f"it is damaged ({_first_line(error)})"
    return None


def entry_start(content: mmap.mmap, entry: zipfile.ZipInfo) -> int:
    """Return where the data of a zip entry begins.

    Raises: ValueError if its header is not where the list of entries says.
    """
    at = entry.header_offset
    header = content[at : at + LOCAL_HEADER]
    if len(header) < LOCAL_HEADER or not header.startswith(LOCAL_MAGIC):
        raise ValueError(f"the header of {entry.filename} is damaged")
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    if content[at + LOCAL_HEADER : at + LOCAL_HEADER + name] != entry.orig_filename.encode():
        raise ValueError(f"the name of {entry.filename} is damaged")
    return at + LOCAL_HEADER + name + extra


def _check_entry(content: mmap.mmap, entry: zipfile.ZipInfo) -> str | None:
    start = entry_start(content, entry)
    if start + entry.compress_size > len(content):
        return "it is cut off"
    with memoryview(content)[start : start + entry.compress_size] as data:
        if entry.compress_type == zipfile.ZIP_STORED:
            length, checksum = len(data), zlib.crc32(data)
        elif entry.compress_type == zipfile.ZIP_DEFLATED:
            length, checksum = _crc_of_deflated(data, entry.file_size)
        else:
            return f"{entry.filename} is packed in a way that torch.save does not use"
    if length != entry.file_size:
        return f"{entry.filename} has another size than declared"
    return f"the checksum of {entry.filename} is wrong" if checksum != entry.CRC else None


def _crc_of_deflated(data: memoryview, declared: int) -> tuple[int, int]:
    """Return size and checksum of packed data; stop beyond the declared size."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    length, checksum, rest = 0, 0, bytes(data)
    while rest and length <= declared:
        block = unpacker.decompress(rest, STEP)
        length, checksum = length + len(block), zlib.crc32(block, checksum)
        if not block and unpacker.unconsumed_tail == rest:
            break
        rest = unpacker.unconsumed_tail
    return length, checksum


def _check_pickles(path: Path) -> str | None:
    """Check the format before PyTorch 1.6, pickles in a row and raw storages; or one pickle."""
    with mapped(path) as content:
        size, known = len(content), content[:1] == b"\x80"
        try:
            # Magic number, protocol, byte sizes, content; a plain pickle is the content alone.
            pickles = [read_pickle(content)]
            if is_legacy(pickles[0]):
                pickles += [read_pickle(content) for _ in range(3)]
            elif content.tell() < size:
                return "it is in no known format, or damaged"
        except (ValueError, EOFError, IndexError, OverflowError) as error:
            kind = "cut off or damaged" if known else "in no known format"
            return f"it is {kind} ({_first_line(error)})"
    return next((p for p in (_check_storages(pickled, size) for pickled in pickles) if p), None)


def is_legacy(first: bytes) -> bool:
    """Tell whether a file's first pickle is the magic number of torch.save before 1.6."""
    return first == b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def read_pickle(content: mmap.mmap) -> bytes:
    """Read one pickle from where a mapping stands, which is decoded and not run.

    Raises: ValueError or another error if it is damaged.
    """
    start = content.tell()
    # A mapping gives what it has, however much a damaged pickle asks for.
    for _ in pickletools.genops(content):  # type: ignore[arg-type]
        pass
    return content[start : content.tell()]


def _check_storages(pickled: bytes, size: int) -> str | None:
    """Compare the storages that a pickle refers to with the size of its file."""
    largest, last_int = 0, 0
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"):
            last_int = int(argument or 0)
        elif opcode.name == "BINPERSID":  # ("storage", type, key, device, number of elements)
            largest = max(largest, last_int)
    return f"it has {size:,} bytes and declares {largest:,} elements" if largest > size else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
