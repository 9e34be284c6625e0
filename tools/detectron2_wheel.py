"""Make the wheel of Detectron2 from its published sources."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from detectron2_patches import EDITS, STUB, apply_edits

VERSION = "0.6+pure1"
WHEEL_FILE = f"detectron2-{VERSION}-py3-none-any.whl"
DIST_INFO = f"detectron2-{VERSION}.dist-info"
EPOCH = (1980, 1, 1, 0, 0, 0)

# Folders of the archive and where they go in the wheel.
LAYOUT = (
    ("detectron2/", "detectron2/"),
    ("projects/PointRend/point_rend/", "detectron2/projects/point_rend/"),
    ("projects/DeepLab/deeplab/", "detectron2/projects/deeplab/"),
    ("projects/Panoptic-DeepLab/panoptic_deeplab/", "detectron2/projects/panoptic_deeplab/"),
    ("LICENSE", f"{DIST_INFO}/LICENSE"),
)

METADATA = f"""\
Metadata-Version: 2.1
Name: detectron2
Version: {VERSION}
Summary: Detectron2 v0.6 in pure Python, edited to run on current libraries
Home-page: https://github.com/facebookresearch/detectron2
Author: FAIR
License: Apache-2.0
Requires-Python: >=3.10
Requires-Dist: torch>=2.4
Requires-Dist: torchvision>=0.19
Requires-Dist: numpy>=1.24
Requires-Dist: pillow>=9.1
Requires-Dist: fvcore>=0.1.5,<0.1.6
Requires-Dist: iopath>=0.1.9,<0.2
Requires-Dist: omegaconf>=2.1,<2.4
Requires-Dist: hydra-core>=1.1,<1.4
Requires-Dist: yacs>=0.1.8
Requires-Dist: cloudpickle
Requires-Dist: tabulate
Requires-Dist: termcolor>=1.1
Requires-Dist: tqdm
Requires-Dist: pycocotools>=2.0.7
Requires-Dist: matplotlib
Requires-Dist: tensorboard

Detectron2 v0.6 (Apache-2.0, see LICENSE) without its compiled operators.

Files were changed from the published v0.6 sources; focalnet_det's
tools/detectron2_patches.py lists every change and its reason:

"""

WHEEL = "Wheel-Version: 1.0\nGenerator: focalnet_det\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def read_sources(archive: Path) -> dict[str, bytes]:
    """Read the files that go into the wheel; nothing is unpacked to disk."""
    sources: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            for source, target in LAYOUT:
                if member.isfile() and name.startswith(source):
                    content = tar.extractfile(member)
                    assert content is not None  # isfile() was true
                    sources[target + name[len(source) :]] = content.read()
    return sources


def record_line(name: str, content: bytes) -> str:
    """Format a line of a wheel's RECORD."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(content)}\n"


def wheel_bytes(files: Mapping[str, bytes]) -> bytes:
    """Zip the files and their RECORD; the same files give the same bytes on any machine."""
    record = f"{DIST_INFO}/RECORD"
    lines = [record_line(name, files[name]) for name in sorted(files)]
    complete = {**files, record: "".join([*lines, f"{record},,\n"]).encode()}
    buffer = io.BytesIO()
    # Stored, not compressed: compressed bytes differ between versions of zlib.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as wheel:
        for name in [*sorted(files), record]:
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.create_system = 3
            entry.external_attr = 0o100644 << 16
            wheel.writestr(entry, complete[name])
    return buffer.getvalue()


def build_wheel(archive: Path, folder: Path) -> Path:
    """Write the edited sources as a wheel into `folder`."""
    files = apply_edits(read_sources(archive), EDITS)
    reasons = dict.fromkeys(f"- {edit.file}: {edit.reason}" for edit in EDITS)
    files["detectron2/_C.py"] = STUB.encode()
    files[f"{DIST_INFO}/METADATA"] = (METADATA + "\n".join(reasons) + "\n").encode()
    files[f"{DIST_INFO}/WHEEL"] = WHEEL.encode()
    files[f"{DIST_INFO}/top_level.txt"] = b"detectron2\n"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / WHEEL_FILE
    write_atomically(wheel, wheel_bytes(files))
    return wheel


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name and rename: an interrupted run leaves no half file."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
