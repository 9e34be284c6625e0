"""Read the parts of a file of torch.save: mapped bytes, zip entries, pickles in a row."""

import mmap
import pickletools
import zipfile
from pathlib import Path

# Of a zip entry: fixed part of the header before its name, and how it begins.
LOCAL_HEADER, LOCAL_MAGIC = 30, b"PK\x03\x04"
# The first pickle of torch.save before version 1.6: its magic number, in protocol 2.
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def map_file(path: Path) -> mmap.mmap:
    """Map a file that is not empty; changes stay in memory.

    It is never closed by hand: tensors of ``torch.frombuffer`` go on using it and do not say so.
    """
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def entry_start(content: mmap.mmap, entry: zipfile.ZipInfo) -> int:
    """Return where the data of a zip entry begins.

    Raises: ValueError if its header is not where the list of entries says, or its data are cut off.
    """
    at = entry.header_offset
    header = content[at : at + LOCAL_HEADER]
    if len(header) < LOCAL_HEADER or not header.startswith(LOCAL_MAGIC):
        raise ValueError(f"it is damaged (the header of {entry.filename})")
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    if content[at + LOCAL_HEADER : at + LOCAL_HEADER + name] != entry.orig_filename.encode():
        raise ValueError(f"it is damaged (the name of {entry.filename})")
    start = at + LOCAL_HEADER + name + extra
    if start + entry.compress_size > len(content):
        raise ValueError("it is cut off")
    return start


def read_pickle(content: mmap.mmap) -> bytes:
    """Read one pickle from where a mapping stands; it is decoded and not run.

    Raises: ValueError if it is damaged.
    """
    start = content.tell()
    try:
        # A mapping gives what it has, however much a damaged pickle asks for.
        for _ in pickletools.genops(content):  # type: ignore[arg-type]
            pass
    except (ValueError, EOFError, IndexError, OverflowError, MemoryError) as error:
        known = content[start : start + 1] == b"\x80"
        kind = "cut off or damaged" if known else "in no known format"
        raise ValueError(f"it is {kind} ({first_line(error)})") from None
    return content[start : content.tell()]


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
