"""Keep built kernels in a folder, if it can be trusted.

A library runs as this user. It is loaded only if nobody but this user and root could have written
it, as OpenSSH asks of its keys, and if its content has the checksum that its name ends in: a
truncated file would end the process at some later page.
"""

import contextlib
import ctypes
import errno
import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ...atomic import remove_leftovers, replacing

VARIABLE = "FOCALNET_DET_CACHE"
# Seconds for which another process may build.
PATIENCE = 60.0
# Bytes that must be free: several times a library.
SPACE = 8 * 2**20
SCRATCH = ".build-"

logger = logging.getLogger(__name__)


class CacheError(RuntimeError):
    """The folder cannot be used; the text says why."""


def cache_folder() -> Path:
    """Return ``FOCALNET_DET_CACHE``, else ``focalnet_det`` in ``XDG_CACHE_HOME`` or ``~/.cache``.

    Raises: CacheError if there is no home folder.
    """
    try:
        if folder := os.environ.get(VARIABLE):
            return Path(folder).expanduser().absolute()
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:
        raise CacheError(f"there is no folder for them: {error}") from None
    if not base.is_absolute():
        raise CacheError(f"there is no folder for them: {base} depends on where a command runs")
    return base / "focalnet_det"


def load(key: str, build: Callable[[Path], None], notes: list[str]) -> ctypes.CDLL:
    """Return the library of a key from the cache, built into it if it is not there.

    Args:
        key: of a build.
        build: writes a library to a path.
        notes: gets sentences about files that were damaged.
    Raises: CacheError if the folder cannot be used; whatever ``build`` raises.
    """
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        folder = folder.resolve(strict=True)
        if distrusted := distrust(folder):
            raise CacheError(distrusted)
        # Whoever can only read needs no lock.
        found = _find(folder, key)
        if found is None:
            with _locked(folder):
                notes += _remove_damaged(folder, key)
                found = _find(folder, key) or _build(folder, key, build)
        return found
    except OSError as error:
        raise CacheError(f"their cache cannot be used: {error}") from None


def load_alone(build: Callable[[Path], None]) -> ctypes.CDLL:
    """Return a library that is built for this process and kept nowhere.

    Raises: CacheError if there is no folder for it; whatever ``build`` raises.
    """
    try:
        # Already loaded, a library needs its file no more.
        with tempfile.TemporaryDirectory(
            prefix="focalnet_det_", ignore_cleanup_errors=True
        ) as name:
            folder = Path(name).resolve(strict=True)
            if distrusted := distrust(folder):
                raise CacheError(distrusted)
            build(folder / "native.so")
            return ctypes.CDLL(str(folder / "native.so"))
    except OSError as error:
        raise CacheError(f"no temporary folder can be used: {error}") from None


def distrust(path: Path) -> str:
    """Return who else could change a file or folder, empty if nobody could.

    It and every folder above it, up to the home folder, must belong to this user or root, and
    only they may write to it. Folders above may be sticky, as ``/tmp`` is.

    Args:
        path: without symbolic links.
    Raises: OSError if a folder cannot be looked at.
    """
    home = os.path.realpath(os.path.expanduser("~"))
    for each in (path, *path.parents):
        status = each.lstat()
        if status.st_uid not in (0, os.geteuid()):
            return f"{each} belongs to another user"
        others = stat.S_IWOTH if _is_private(status.st_gid) else stat.S_IWOTH | stat.S_IWGRP
        sticky = each != path and status.st_mode & stat.S_ISVTX
        if status.st_mode & others and not sticky:
            return f"others may write to {each} (chmod go-w takes that from them)"
        if str(each) == home:
            break
    return ""


def _is_private(group: int) -> bool:
    """Tell whether only this user, or root, is in a group: the default group of many systems."""
    import grp
    import pwd

    if group == 0:
        return True
    try:
        user, entry = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    alone = set(entry.gr_mem) <= {user.pw_name}
    return alone and group == user.pw_gid and entry.gr_name == user.pw_name


def _find(folder: Path, key: str) -> ctypes.CDLL | None:
    """Return the library of a key, if there is a whole one."""
    for file in sorted(folder.glob(f"{key}-*.so")):
        if not _damage(file):
            return ctypes.CDLL(str(file))
    return None


def _remove_damaged(folder: Path, key: str) -> list[str]:
    """Remove what is no whole library of a key; return a sentence about each."""
    notes = []
    for file in sorted(folder.glob(f"{key}-*.so")):
        if damage := _damage(file):
            file.unlink()
            notes.append(damage)
    return notes


def _damage(file: Path) -> str:
    """Return why a library must not be loaded, empty if it may."""
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            return f"{file} was no file"
        if distrusted := distrust(file):
            return distrusted
        whole = file.stem.endswith(f"-{_checksum(file)}")
    except FileNotFoundError:
        return f"{file} has gone"  # another process has just removed it
    return "" if whole else f"{file} was damaged"


def _build(folder: Path, key: str, build: Callable[[Path], None]) -> ctypes.CDLL:
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise CacheError(f"{folder} is on a disk from which no programs run")
    with tempfile.TemporaryDirectory(
        prefix=SCRATCH, dir=folder, ignore_cleanup_errors=True
    ) as name:
        _reserve(Path(name) / "space")
        built = Path(name) / "native.so"
        build(built)
        file = folder / f"{key}-{_checksum(built)}.so"
        with replacing(file, durable=False) as temporary:
            shutil.copyfile(built, temporary)
            temporary.chmod(0o755)
    return ctypes.CDLL(str(file))


def _checksum(file: Path) -> str:
    """Return a hash of a library, part of its name in the cache."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:32]


def _reserve(file: Path) -> None:
    """Reserve space for a library.

    Raises: OSError if a disk is full: a compiler would say so in its own words, or not.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with file.open("wb") as handle:
            os.posix_fallocate(handle.fileno(), 0, SPACE)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
    finally:
        file.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from building; one that has died keeps nobody.

    Raises: CacheError if another one holds the lock for long.
    """
    from filelock import FileLock, Timeout  # what PyTorch itself needs, too slow to import always

    lock = FileLock(folder / "lock")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("Waiting for another process that builds the native kernels in %s.", folder)
            lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise CacheError(f"another process has held {folder / 'lock'} for {PATIENCE:g} s") from None
    except NotImplementedError:
        yield  # a disk without locks: files appear whole all the same
        return
    try:
        remove_leftovers(folder)
        for left in folder.glob(f"{SCRATCH}*"):  # by processes that were killed
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.release()
