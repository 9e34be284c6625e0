"""Read images from tar and zip archives in place.

The path of an image names its archive and its place there, so that any process can read it without
an index: ``archive:///data/train.tar@1536+9021t/n01440764/10026.jpg``.
"""

import io
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

PREFIX = "archive://"
SUFFIXES = (".tar", ".zip")
PATTERN = re.compile(r"archive://(?P<file>.+?)@(?P<offset>\d+)\+(?P<size>\d+)(?P<kind>[tsz])/")
# Kinds of members: of a tar; of a zip, stored or deflated.
TAR, STORED, DEFLATED = "t", "s", "z"
# Bytes of the fixed part of a local file header, and where the lengths of its ends are.
# Source: PKWARE's APPNOTE.TXT, section 4.3.7.
ZIP_HEADER, ZIP_LENGTHS = 30, 26


class ArchiveHandler(PathHandler):
    """Opens members of archives, by paths that :func:`archive_members` yields."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _isfile(self, path: str, **_: Any) -> bool:
        match = PATTERN.match(path)
        return match is not None and Path(match["file"]).is_file()

    _exists = _isfile

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> IO[Any]:  # noqa: ARG002
        """Open a member for reading.

        Raises: ValueError for another mode, a path that names no place, or a damaged archive.
        """
        match = PATTERN.match(path)
        if match is None or mode != "rb":
            raise ValueError(f"{path} cannot be opened as a member of an archive (mode {mode}).")
        return io.BytesIO(_read(match["file"], int(match["offset"]), int(match["size"]), match))


def _read(file: str, offset: int, size: int, match: re.Match[str]) -> bytes:
    with open(file, "rb") as archive:
        archive.seek(offset)
        if match["kind"] != TAR:
            header = archive.read(ZIP_HEADER)
            archive.seek(sum(struct.unpack_from("<HH", header, ZIP_LENGTHS)), io.SEEK_CUR)
        content = archive.read(size)
    if len(content) < size:
        raise ValueError(f"the archive {file} ends within it")
    if match["kind"] != DEFLATED:
        return content
    try:
        return zlib.decompress(content, -zlib.MAX_WBITS)
    except zlib.error as error:
        raise ValueError(f"it is damaged in the archive {file}: {error}") from error


def archive_members(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yield name and path of each file in an archive; in a tar of tars, of each file in these.

    Args:
        path: ``.tar`` or ``.zip``.
    Raises: ValueError if it cannot be read, or is compressed as a whole.
    """
    path = Path(path).absolute()
    try:
        rows = _zip_rows(path) if path.suffix.lower() == ".zip" else _tar_rows(path)
        for name, offset, size, kind in rows:
            yield name, f"{PREFIX}{path}@{offset}+{size}{kind}/{name}"
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} cannot be read as an archive: {error}. Archives must be .zip, or .tar that is "
            "not compressed (gunzip it)."
        ) from error


def _tar_rows(path: Path) -> Iterator[tuple[str, int, int, str]]:
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if not member.isreg():
                continue
            if not member.name.lower().endswith(".tar"):
                yield member.name, member.offset_data, member.size, TAR
                continue
            folder = member.name[: -len(".tar")]
            with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                for image in inner:
                    if image.isreg():
                        offset = member.offset_data + image.offset_data
                        yield f"{folder}/{image.name}", offset, image.size, TAR


def _zip_rows(path: Path) -> Iterator[tuple[str, int, int, str]]:
    kinds = {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.compress_type not in kinds or info.flag_bits & 1:
                raise ValueError(
                    f"{path}: {info.filename} is encrypted, or compressed otherwise than by "
                    "deflate: make the archive again with zip."
                )
            kind = kinds[info.compress_type]
            yield info.filename, info.header_offset, info.compress_size, kind


PathManager.register_handler(ArchiveHandler(), allow_override=True)
