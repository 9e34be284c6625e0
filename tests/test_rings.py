"""The package is built in rings: a module imports from its own ring and from inner ones alone."""

import ast
from collections import Counter
from importlib.util import resolve_name
from pathlib import Path

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "focalnet_det"
# From inner to outer. Visualization is inside evaluation, which draws its worst images with it.
RINGS = (
    *("errors", "moved", "atomic", "resources", "compat", "supervise", "ops", "layers"),
    *("backbones", "necks"),
    *("analysis", "detectron2", "heads", "data", "visualization", "evaluation", "report"),
    *("checkpoint", "create", "adapters", "huggingface", "experiment", "engine", "predict"),
    *("benchmark", "command_line", "__main__"),
)
MODULES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py" or path.parent != PACKAGE
]


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, functions included."""
    package = ".".join(path.relative_to(PACKAGE.parent).parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("focalnet_det.")}


def ring(name: str) -> int:
    """Number of the ring of a module; -1 for names of the package itself, such as its version."""
    part = name.split(".")[1]
    return (
        RINGS.index(part) if part in RINGS else -1
    )  # the package's own names, such as its version


def test_imports_go_inwards() -> None:
    outward = {}
    for path in MODULES:
        inside = path.relative_to(PACKAGE)
        own = ring(f"focalnet_det.{inside.with_suffix('').parts[0]}")
        if names := sorted(name for name in imported(path) if ring(name) > own):
            outward[str(inside)] = names
    assert outward == {}, "imports from outer rings"


def test_no_two_modules_have_one_name() -> None:
    names = Counter(path.stem for path in PACKAGE.rglob("*.py") if path.stem != "__init__")
    assert [name for name, count in names.items() if count > 1] == []
