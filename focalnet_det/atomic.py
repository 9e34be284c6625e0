"""Write files atomically; every other module of the package writes files through this one."""

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

# Makes temporary names unique within a process; the process id does so between processes.
_COUNTER = itertools.count()


@contextlib.contextmanager
def replacing(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it when the block ends without an error.

    Until then, and if the block fails, `path` keeps its earlier content. The caller need not sync:
    the data reaches the disk before the name does.

    Args:
        path: file to write or replace; missing parent folders are created.
        durable: wait until the data and the renaming are on disk, so that they survive a power
            failure. Switch off for images and other files that are cheap to create again.
    Raises: OSError if the file cannot be written; the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_COUNTER)}.tmp")
    try:
        yield temporary
        if durable:
            _sync(temporary)
        temporary.replace(path)
        if durable:
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, parts: str | Iterable[str], *, durable: bool = True) -> None:
    """Write text as UTF-8, given whole or in parts; options and errors as in :func:`replacing`."""
    with replacing(path, durable=durable) as temporary, temporary.open("w", encoding="utf-8") as f:
        f.writelines([parts] if isinstance(parts, str) else parts)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that killed processes of this machine left in a folder.

    The files of running processes are left alone.
    """
    for path in folder.glob(".*.tmp"):
        owner = path.name.split(".")[-2].partition("-")[0]
        if owner.isdecimal() and not _is_running(int(owner)):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
