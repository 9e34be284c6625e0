"""Identify files that are not checkpoints by their first bytes."""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# Enough for every signature below; a tar archive has its own at 257.
HEAD = 512
_UNPACK = "unpack it and pass the file inside"
_OTHER = "pass the file with the weights instead"
_AGAIN = "download the file itself, not the page that links to it"


@dataclass(frozen=True)
class Signature:
    """A kind of file that is not a checkpoint.

    Attributes:
        title: with an article, for "it is ...".
        remedy: what to do instead.
        magic: bytes that such a file has at the offset.
        offset: position of the magic, bytes.
    """

    title: str
    remedy: str
    magic: bytes
    offset: int = 0


# The first match wins.
SIGNATURES = (
    Signature("a Git LFS pointer", "run `git lfs pull`", b"version https://git-lfs"),
    Signature("a gzip file", _UNPACK, b"\x1f\x8b"),
    Signature("a bzip2 file", _UNPACK, b"BZh"),
    Signature("an xz file", _UNPACK, b"\xfd7zXZ\x00"),
    Signature("a Zstandard file", _UNPACK, b"\x28\xb5\x2f\xfd"),
    Signature("a 7z archive", _UNPACK, b"7z\xbc\xaf\x27\x1c"),
    Signature("a RAR archive", _UNPACK, b"Rar!"),
    Signature("a tar archive", _UNPACK, b"ustar", 257),
    Signature("an HDF5 file", "convert it with the library that wrote it", b"\x89HDF\r\n"),
    Signature("a NumPy array", _OTHER, b"\x93NUMPY"),
    Signature("a GGUF file", _OTHER, b"GGUF"),
    Signature("a PNG image", _OTHER, b"\x89PNG"),
    Signature("a JPEG image", _OTHER, b"\xff\xd8\xff"),
    Signature("a PDF document", _OTHER, b"%PDF"),
    Signature("a program", _OTHER, b"\x7fELF"),
)
# Endings of entries in zip files of other programs; the first match wins.
ZIP_SIGNATURES = (
    ("constants.pkl", "a TorchScript program", "save its state_dict() with torch.save"),
    (".npy", "a file of NumPy arrays (.npz)", "save them as tensors with torch.save"),
    (".keras", "a Keras model", "convert it with the library that wrote it"),
    (".pth", "a zip archive of checkpoints", _UNPACK),
    (".pt", "a zip archive of checkpoints", _UNPACK),
    (".pkl", "a zip archive of checkpoints", _UNPACK),
    (".safetensors", "a zip archive of checkpoints", _UNPACK),
)


def describe_non_checkpoint(path: Path) -> str | None:
    """Describe a file that is not a checkpoint and what to do, None if it may be one.

    Args:
        path: an existing file.
    Returns: a phrase such as "it is a gzip file: unpack it and pass the file inside".
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
        if not head:
            return "it is empty"
        if not head.strip(b"\0") and _is_blank(file):
            return "it contains only zeros: its download or copy was not finished"
    for row in SIGNATURES:
        if head[row.offset :].startswith(row.magic):
            return f"it is {row.title}: {row.remedy}"
    return _describe_text(head, path)


def _is_blank(file: BinaryIO) -> bool:
    """Tell whether the rest of a file is zeros."""
    return not any(block.strip(b"\0") for block in iter(lambda: file.read(1 << 20), b""))


def _describe_text(head: bytes, path: Path) -> str | None:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script")):
        return f"it is an HTML page: {_AGAIN}"
    if start.startswith((b"<?xml", b"<error")):
        return f"it is an XML response of a server: the link is dead or needs a login; {_AGAIN}"
    # The oldest pickle protocol is text as well, and ends in a dot.
    if not _is_text(head) or _is_text_pickle(path):
        return None
    if start.startswith((b"{", b"[")):
        return f"it is a JSON file: {_OTHER}"
    return f"it is a text file: {_OTHER}"


def _is_text(head: bytes) -> bool:
    # A character may be cut at the end of the head.
    text = head.decode("utf-8", "ignore")
    return len(text.encode()) > len(head) - 4 and all(
        c.isprintable() or c in "\r\n\t" for c in text
    )


def _is_text_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(2)
        file.seek(max(0, path.stat().st_size - 2))
        return start in (b"(d", b"(l", b"(i", b"cc", b"ct") and file.read().rstrip().endswith(b".")


def describe_non_checkpoint_zip(archive: zipfile.ZipFile) -> str | None:
    """Describe a zip file that torch.save did not write, None for one that it did."""
    names = archive.namelist()
    tails = {name.rpartition("/")[2] for name in names}
    if "data.pkl" in tails and "constants.pkl" not in tails:
        return None
    for suffix, title, remedy in ZIP_SIGNATURES:
        if any(name.endswith(suffix) for name in names):
            return f"it is {title}: {remedy}"
    first = names[0] if names else "nothing"
    return f"it is a zip archive of other files, first {first[:60]}: {_UNPACK}"
