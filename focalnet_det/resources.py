"""Find configs, tools and datasets: inside an installed package, or beside it in a checkout."""

import ast
from fnmatch import fnmatch
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# Folders of the checkout that a wheel holds inside the package; see setup.py.
FOLDERS = ("configs", "tools", "datasets")


def resource_folder(name: str) -> Path:
    """Return the folder of the configs, of the tools or of the dataset scripts.

    Args:
        name: one of ``FOLDERS``.
    Raises: FileNotFoundError if this installation has none.
    """
    for folder in (PACKAGE / name, PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"This installation of focalnet_det has no folder {name}: install it with pip from a "
        "complete checkout."
    )


def find_config(path: str | Path) -> Path:
    """Return the file that a config path names: as it is, or among the configs of the package.

    Args:
        path: a file of the user, or a path below ``configs``, with or without that folder.
    Returns: the path unchanged, unless only the package has such a file.
    """
    path = Path(path)
    if path.is_absolute() or path.exists():
        return path
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    packaged = resource_folder("configs").joinpath(*parts)
    return packaged if packaged.is_file() else path


def list_configs(pattern: str = "*") -> dict[str, str]:
    """Return what each config of the package trains: the first sentences of its header.

    Args:
        pattern: of paths below ``configs``, as in ``fnmatch``; a word without ``*`` is searched.
    Returns: {path below ``configs``: text}, sorted.
    """
    root = resource_folder("configs")
    pattern = pattern if "*" in pattern else f"*{pattern}*"
    found = {}
    for path in sorted(root.glob("*/*.py")):
        name = path.relative_to(root).as_posix()
        if path.parent.name != "common" and fnmatch(name, pattern):
            header = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            # What follows is a command.
            found[name] = " ".join(header.split("\n\n")[0].split())
    return found
