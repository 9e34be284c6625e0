"""Expand what a user names into images and videos: files, folders, patterns, lists."""

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..data.io.open_image import allowed_formats

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
LIST_SUFFIXES = (".txt", ".lst")


@dataclass(frozen=True)
class Source:
    """An image or a video.

    Attributes:
        path: of the file.
        name: unique within one job, relative, without suffix: outputs are named by it.
    """

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        """Return whether the file is a video, by its suffix."""
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def image_suffixes() -> set[str]:
    """Return the suffixes of image files that can be read, in lower case."""
    Image.init()
    allowed = set(allowed_formats())
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in allowed}


def find_sources(inputs: Sequence[str | Path]) -> list[Source]:
    """Find the images and videos that a user names.

    Args:
        inputs: files; folders, which are searched with their subfolders; patterns such as
            "photos/*.jpg"; text files (.txt) with a path per line, relative to the text file.
    Returns: each file once, in order of the inputs and sorted within each.
    Raises: ValueError for an input that names nothing.
    """
    found: dict[Path, Path] = {}
    for item in map(str, inputs):
        files = dict(_files(item))
        if not files:
            raise ValueError(_nothing(item))
        for path, relative in files.items():
            found.setdefault(path, relative)
    stems = Counter(relative.with_suffix("") for relative in found.values())
    taken: set[str] = set()
    return [
        Source(path, _unique(relative if stems[stem] > 1 else stem, taken))
        for path, relative in found.items()
        for stem in (relative.with_suffix(""),)
    ]


def _unique(name: Path, taken: set[str]) -> str:
    """Return a name that is not taken: files of one name come from different folders."""
    text, number = name.as_posix(), 1
    while text in taken:
        number += 1
        text = f"{name.as_posix()}_{number}"
    taken.add(text)
    return text


def _files(item: str) -> Iterator[tuple[Path, Path]]:
    """Yield (path, path relative to what the user named)."""
    path = Path(item)
    if path.is_dir():
        suffixes = image_suffixes() | set(VIDEO_SUFFIXES)
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in suffixes and file.is_file():
                yield file, file.relative_to(path)
    elif path.suffix.lower() in LIST_SUFFIXES and path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                file = path.parent / line.strip()
                yield file, Path(file.name)
    elif path.exists():
        yield path, Path(path.name)
    elif glob.has_magic(item):
        for name in sorted(glob.glob(item, recursive=True)):
            if Path(name).is_file():
                yield Path(name), Path(Path(name).name)


def _nothing(item: str) -> str:
    if Path(item).is_dir():
        return f"{item} holds no image and no video: name another folder, or the files themselves."
    if glob.has_magic(item):
        return f"No file matches {item!r}."
    return f"{item} does not exist: name an image, a video, a folder, a pattern or a .txt list."
