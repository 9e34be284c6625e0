"""Read the parts of a file of torch.save: mapped bytes, zip entries, consecutive pickles."""

import mmap
import pickletools
import zipfile
from pathlib import Path

# Length of the fixed part of a zip entry's header, and its first bytes.
LOCAL_HEADER, LOCAL_MAGIC = 30, b"PK\x03\x04"
# The first pickle of torch.save before version 1.6: its magic number, in protocol 2.
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def map_file(path: Path) -> mmap.mmap:
    """Map a file that is not empty; changes stay in memory.

    The mapping must not be closed: tensors of ``torch.frombuffer`` use it without a reference.
    """
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def entry_start(content: mmap.mmap, entry: zipfile.ZipInfo) -> int:
    """Return the position of the data of a zip entry, bytes.

    Raises: ValueError if its header is not where the list of entries says, or its data is cut off.
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
    """Read one pickle from the current position of a mapping, without executing it.

    Raises: ValueError if it is damaged.
    """
    start = content.tell()
    try:
        # A mapping returns what it has, even if a damaged pickle asks for more.
        for _ in pickletools.genops(content):  # type: ignore[arg-type]
            pass
    except (ValueError, EOFError, IndexError, OverflowError, MemoryError) as error:
        known = content[start : start + 1] == b"\x80"
        problem = "it is cut off or damaged" if known else "its format is unknown"
        raise ValueError(f"{problem} ({first_line(error)})") from None
    return content[start : content.tell()]


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
