"""Name what files are that are not intact checkpoints, by kind of damage and of stranger."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from focalnet_det.checkpoint import check_file, inspect_checkpoint, write_state_dict
from focalnet_det.checkpoint.files import unwrap
from focalnet_det.checkpoint.fit import value_problem
from focalnet_det.checkpoint.reader.unpickle import Placeholder
from tests.helpers.paths import ROOT

WEIGHTS = {"a": torch.arange(1000.0), "b.c": torch.ones(3, 5)}


def saved(*, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        row = tarfile.TarInfo("model.pth")
        row.size = 4
        archive.addfile(row, io.BytesIO(b"1234"))
    return buffer.getvalue()


def zip_of(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"something")
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    return buffer.getvalue()


def script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), buffer)
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    return buffer.getvalue()


STRANGERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "^it is empty$"),
    "zeros": (lambda: bytes(3000), "only zeros"),
    "html": (lambda: b"\n<!DOCTYPE html>\n<html><body>Sign in", "an HTML page: download the file"),
    "html2": (lambda: b"\xef\xbb\xbf<HTML>", "an HTML page"),
    "xml": (lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied', "XML response of a server"),
    "lfs": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
        "a Git LFS pointer: run `git lfs pull`",
    ),
    "gzip": (lambda: gzip.compress(saved()), "a gzip file: unpack it"),
    "bzip2": (lambda: bz2.compress(saved()), "a bzip2 file: unpack it"),
    "xz": (lambda: lzma.compress(saved()), "an xz file: unpack it"),
    "tar": (tar, "a tar archive: unpack it"),
    "zip": (lambda: zip_of("images/cat.jpg"), "zip archive of other files, first images/cat.jpg"),
    "zip of files": (lambda: zip_of("run/model.pth"), "a zip archive of checkpoints: unpack it"),
    "npz": (npz, r"NumPy arrays \(.npz\): save them as tensors"),
    "script": (script, r"a TorchScript program: save its state_dict\(\)"),
    "png": (png, "a PNG image"),
    "json": (lambda: json.dumps({"a": [1]}).encode(), "a JSON file"),
    "text": (lambda: "weights: später\n".encode(), "a text file"),
    "noise": (lambda: bytes(range(130, 256)), "format is unknown"),
}


@pytest.mark.parametrize("name", sorted(STRANGERS))
def test_files_of_other_kinds_are_named(name: str, tmp_path: Path) -> None:
    make, message = STRANGERS[name]
    path = tmp_path / "model.pth"
    path.write_bytes(make())
    with pytest.raises(ValueError, match=f"model.pth: .*{message.strip('^$')}"):
        inspect_checkpoint(path)
    problem = check_file(path)
    assert problem is not None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(problem)


def test_the_documentation_quotes_the_messages(tmp_path: Path) -> None:
    """The table of refused files in docs/checkpoints.md, row by row."""
    page = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")
    table = page.partition("## What is recognized, and how it is refused")[2].split("\n## ")[0]
    quotes = {quote for line in table.splitlines() for quote in re.findall(r'"([^"]+)"', line)}
    made = [STRANGERS[name][0]() for name in ("empty", "zeros", "html", "lfs", "gzip")]
    made += [saved()[:-1], flipped()]
    for number, content in enumerate(made):
        (tmp_path / str(number)).write_bytes(content)
    torch.save({"a": Attack()}, tmp_path / "attack")
    messages = [str(check_file(path)) for path in tmp_path.iterdir()]
    messages.append(str(value_problem("head.weight", torch.ones(1).to(torch.float8_e4m3fn))))
    with pytest.raises(ValueError, match="head") as refused:
        unwrap({"state_dict": {"head.weight": Placeholder("some.Class")}}, "x.pth")
    messages.append(str(refused.value))
    unsaid = {quote for quote in quotes if not any(quote in message for message in messages)}
    # Two sentences on networks, which their own tests quote in full.
    assert {quote.partition(" (")[0] for quote in unsaid} == {
        "this is a Cascade Mask R-CNN",
        "The file is a ResNet-50 classifier",
    }


class Attack:
    """Pickled as a call of a shell."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def flipped() -> bytes:
    """A file of four tensors, with a changed bit in the last."""
    buffer = io.BytesIO()
    torch.save([torch.full((500,), float(value)) for value in range(4)], buffer)
    content = bytearray(buffer.getvalue())
    content[content.index(torch.full((500,), 3.0).numpy().tobytes())] ^= 1
    return bytes(content)


def test_whole_files(tmp_path: Path) -> None:
    for name, content in (("zip", saved()), ("old", saved(zipped=False))):
        (tmp_path / name).write_bytes(content)
        assert check_file(tmp_path / name) is None
    write_state_dict(tmp_path / "a.safetensors", WEIGHTS)
    assert check_file(str(tmp_path / "a.safetensors")) is None
    assert check_file(tmp_path) == "it is a folder"
    assert check_file(tmp_path / "none") == "there is no such file"


@pytest.mark.parametrize("zipped", [True, False])
def test_every_truncation_is_found(zipped: bool, tmp_path: Path) -> None:
    whole, path = saved(zipped=zipped), tmp_path / "cut.pth"
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        assert check_file(path) is not None, length
    path.write_bytes(whole[:-1])
    assert "cut off" in str(check_file(path))


def test_every_changed_number_is_found(tmp_path: Path) -> None:
    """One bit anywhere in the data of any entry, named by the entry."""
    whole, path = saved(), tmp_path / "flipped.pth"
    start = whole.index(torch.arange(1000.0).numpy().tobytes())
    for offset in range(0, 4000, 97):
        changed = bytearray(whole)
        changed[start + offset] ^= 1 << offset % 8
        path.write_bytes(changed)
        assert check_file(path) == "the checksum of archive/data/0 is wrong"


def test_packed_entries_are_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "packed.pth"
    with (
        zipfile.ZipFile(io.BytesIO(saved())) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
        at = new.getinfo("archive/data/0").header_offset
    assert check_file(path) is None
    changed = bytearray(path.read_bytes())
    changed[at + 200] ^= 16
    path.write_bytes(changed)
    assert check_file(path) is not None
