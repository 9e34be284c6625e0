"""The folder of built kernels: whom it trusts, damaged files, full disks, several processes."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from focalnet_det.ops.cpu import (
    capabilities,
)
from focalnet_det.ops.cpu import (
    library as native,
)
from focalnet_det.ops.cpu import (
    library_build as native_build,
)
from focalnet_det.ops.cpu import (
    library_cache as native_cache,
)
from tests.helpers.small_library import (
    AGAIN,
    ALONE,
    Warnings,
    assert_blocks_run_without,
    assert_loaded,
    built,
    needs_compiler,
)  # fmt: skip

pytestmark = [pytest.mark.usefixtures("cache"), needs_compiler]


def test_what_is_built_is_found(cache: Path, warnings: Warnings, caplog: object) -> None:
    assert_loaded(warnings)
    file = built(cache)
    before = file.stat()
    assert stat.S_IMODE(before.st_mode) == 0o755
    native_build.SOURCE.touch()
    assert_loaded(warnings)
    assert file.stat().st_ino == before.st_ino
    assert sorted(path.name for path in cache.iterdir() if path.name != "lock") == [file.name]


def cut(length: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:length]


DAMAGES = {
    "empty": cut(0),
    "four bytes": cut(4),
    "a page": cut(4096),
    "all but a byte": cut(-1),
    "zeros": lambda content: bytes(len(content)),
    "a flipped bit": lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    "more": lambda content: content + b"\0",
    "a page of HTML": lambda _: b"<!DOCTYPE html>",
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_libraries_are_built_again(case: str, cache: Path, warnings: Warnings) -> None:
    assert_loaded(warnings)
    file = built(cache)
    whole = file.read_bytes()
    file.unlink()  # what is loaded stays as it is
    file.write_bytes(DAMAGES[case](whole))
    file.chmod(0o755)
    assert_loaded(warnings, f"{file} was damaged", AGAIN)
    assert built(cache).read_bytes() == whole
    assert_loaded(warnings)


def replace_by_link(file: Path) -> None:
    other = file.with_name("other.so.txt")
    file.rename(other)
    file.symlink_to(other)


def replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


REPLACED = {
    "others may write": (lambda file: file.chmod(0o757), "others may write to "),
    "a link": (replace_by_link, "was no file"),
    "a pipe": (replace_by_pipe, "was no file"),
}


@pytest.mark.parametrize("case", REPLACED)
def test_libraries_that_others_may_have_made_are_built_again(
    case: str, cache: Path, warnings: Warnings
) -> None:
    assert_loaded(warnings)
    change, reason = REPLACED[case]
    change(built(cache))
    assert_loaded(warnings, reason, AGAIN)
    assert stat.S_IMODE(built(cache).lstat().st_mode) == 0o755
    assert_loaded(warnings)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o757])
@pytest.mark.parametrize("depth", [0, 1])
def test_folders_that_others_may_write_to_are_left_alone(
    depth: int, mode: int, cache: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache / "inner"
    folder.mkdir(parents=True)
    monkeypatch.setenv("FOCALNET_DET_CACHE", str(folder))
    (folder, cache)[depth].chmod(mode)
    if depth and mode == 0o1777:  # such as /tmp
        assert_loaded(warnings)
        assert built(folder)
        return
    assert_loaded(warnings, f"others may write to {(folder, cache)[depth]} (chmod", ALONE)
    assert not list(folder.iterdir())


def test_who_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This user and root; a group if nobody else is in it."""
    me, group = os.geteuid(), 54321
    status = SimpleNamespace(st_uid=me, st_gid=group, st_mode=0o40775)
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    lstat = Path.lstat
    monkeypatch.setattr(Path, "lstat", lambda path: status if path == folder else lstat(path))
    entry = SimpleNamespace(gr_name="ada", gr_mem=[])
    user = SimpleNamespace(pw_name="ada", pw_gid=group)
    monkeypatch.setattr("grp.getgrgid", lambda _: entry)
    monkeypatch.setattr("pwd.getpwuid", lambda _: user)
    assert not native_cache.distrust(folder)
    for owner, attribute, value in (
        (entry, "gr_mem", ["ada", "bob"]), (entry, "gr_name", "staff"), (user, "pw_gid", 5),
    ):  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, attribute, value)
            assert native_cache.distrust(folder).startswith(f"others may write to {folder} ")
    monkeypatch.setattr("grp.getgrgid", {}.__getitem__)  # a number without a name
    assert native_cache.distrust(folder)
    status.st_mode = 0o40755
    assert not native_cache.distrust(folder)
    status.st_uid = 0
    assert not native_cache.distrust(folder)
    status.st_uid = me + 54321
    assert native_cache.distrust(folder) == f"{folder} belongs to another user"
    # What is above the home folder is the system's affair.
    status.st_uid = me
    above = folder.parent
    monkeypatch.setattr(
        Path,
        "lstat",
        lambda path: (
            SimpleNamespace(st_uid=me, st_gid=0, st_mode=0o40777) if path == above else lstat(path)
        ),
    )
    assert native_cache.distrust(folder)
    monkeypatch.setenv("HOME", str(folder))
    assert not native_cache.distrust(folder)


def test_folders_of_other_users(
    cache: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_loaded(warnings)
    if os.geteuid() == 0:
        os.chown(cache, 54321, -1)
        assert_loaded(warnings, f"{cache} belongs to another user", ALONE)
        return
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 54321)
        # Neither is the temporary folder.
        assert_blocks_run_without("belongs to another user", warnings)


@pytest.mark.parametrize("case", ["no home", "unknown user", "relative", "below a file", "a file"])
def test_without_a_folder_for_the_cache(
    case: str, tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FOCALNET_DET_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    file = tmp_path / "small.cpp"
    if case == "no home":
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    elif case == "relative":
        monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    else:
        values = {
            "unknown user": "~no-such-user/x",
            "below a file": f"{file}/x",
            "a file": str(file),
        }
        monkeypatch.setenv("FOCALNET_DET_CACHE", values[case])
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert_loaded(warnings, "", ALONE)
    assert sorted(tmp_path.iterdir()) == before


def test_relative_folders_are_not_searched_by_the_loader(
    tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOCALNET_DET_CACHE", ".")
    assert_loaded(warnings)
    assert built(tmp_path)
    assert_loaded(warnings)


def test_who_can_only_read_needs_no_lock(
    cache: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_loaded(warnings)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    # Root may write anywhere.
    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    monkeypatch.setattr(native_cache, "replacing", refuse)
    assert_loaded(warnings)
    built(cache).write_bytes(b"")
    assert_loaded(warnings, "their cache cannot be used: [Errno 30] Read-only file system", ALONE)


@pytest.mark.parametrize("fault", ["no space", "no quota", "no programs", "full at the end"])
def test_disks_that_take_no_library(
    fault: str, cache: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(code: int) -> Callable:
        def function(*_: object, **__: object) -> None:
            raise OSError(code, os.strerror(code))

        return function

    reasons = {
        "no space": "No space left on device", "no quota": "Disk quota exceeded",
        "no programs": f"{cache} is on a disk from which no programs run",
        "full at the end": "No space left on device",
    }  # fmt: skip
    if fault == "no programs":
        flags = SimpleNamespace(f_flag=os.ST_NOEXEC)
        monkeypatch.setattr(os, "statvfs", lambda _: flags)
    elif fault == "full at the end":
        monkeypatch.setattr(shutil, "copyfile", fail(errno.ENOSPC))
    else:
        code = errno.ENOSPC if fault == "no space" else errno.EDQUOT
        monkeypatch.setattr(os, "posix_fallocate", fail(code))
    assert_loaded(warnings, reasons[fault], ALONE)
    assert [path.name for path in cache.iterdir()] == ["lock"]


def test_disks_that_reserve_nothing(warnings: Warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert_loaded(warnings)


def test_neither_a_cache_nor_a_temporary_folder(
    tmp_path: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOCALNET_DET_CACHE", str(tmp_path / "small.cpp"))
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    monkeypatch.setattr("tempfile.tempdir", str(open_to_all))
    assert_blocks_run_without(f"others may write to {open_to_all}", warnings)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    assert_blocks_run_without("no temporary folder can be used", warnings)


# Several processes


def hold(file: Path, ready: object) -> None:
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        ready.set()
        time.sleep(600)


@contextlib.contextmanager
def holder(file: Path) -> Iterator[multiprocessing.Process]:
    """A process that holds a lock."""
    file.parent.mkdir(exist_ok=True)
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(file, ready), daemon=True)
    process.start()
    assert ready.wait(60)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def test_a_lock_that_is_held_for_long(
    cache: Path, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_cache, "PATIENCE", 0.3)
    reason = f"another process has held {cache / 'lock'} for 0.3 s"
    with holder(cache / "lock"):
        assert_loaded(warnings, reason, ALONE)
        assert not list(cache.glob("*.so"))
    assert_loaded(warnings)
    with holder(cache / "lock"):
        assert_loaded(warnings)  # what is built needs no lock


def test_a_lock_whose_holder_is_killed(cache: Path, warnings: Warnings) -> None:
    with holder(cache / "lock") as process:
        left = cache / f"{native_cache.SCRATCH}x"
        left.mkdir()
        (left / "native.so").write_bytes(b"half of it")
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert_loaded(warnings)
        assert not left.exists()


def test_a_disk_without_locks(warnings: Warnings, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", unsupported)
    assert_loaded(warnings)


def builds(folder: Path) -> int:
    """How often a process compiles that wants the library."""
    os.environ["FOCALNET_DET_CACHE"] = str(folder)
    native.library.cache_clear()
    compile_library, count = native_build.compile_library, 0

    def counted(*arguments: object) -> None:
        nonlocal count
        count += 1
        compile_library(*arguments)

    native_build.compile_library = counted
    assert isinstance(native.library(), native.Library)
    return count


def test_processes_that_start_together_build_once_and_others_mend(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    with context.Pool(2, maxtasksperchild=1) as pool:
        assert sorted(pool.map(builds, [cache] * 2, chunksize=1)) == [0, 1]
        whole = built(cache).read_bytes()
        built(cache).write_bytes(b"\x7fELF")
        assert pool.map(builds, [cache]) == [1]
    assert built(cache).read_bytes() == whole
    assert {path.name for path in cache.iterdir()} == {"lock", built(cache).name}


def test_other_sources_compilers_and_machines_have_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = native_build.find_compiler()
    keys = [native_build.build_key(compiler), native_build.build_key(compiler)]
    assert keys[0] == keys[1]
    keys.append(native_build.build_key([*compiler, "-DX"]))
    with monkeypatch.context() as patch:
        patch.setattr(capabilities, "fingerprint", lambda: "another one")
        keys.append(native_build.build_key(compiler))
        patch.setattr(capabilities, "missing", lambda _: [])
        for level in ("none", "avx2"):
            patch.setenv(capabilities.VARIABLE, level)
            keys.append(native_build.build_key(compiler))
    (tmp_path / "parts.h").write_text("int x;")
    monkeypatch.setattr(native_build, "SOURCE", tmp_path / "kernels.cpp")
    for changed in ("kernels.cpp", "kernels.cpp", "parts.h"):
        with (tmp_path / changed).open("a") as file:
            file.write("\n")
        keys.append(native_build.build_key(compiler))
    assert len(set(keys)) == len(keys) - 1
