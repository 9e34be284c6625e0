#!/usr/bin/env python3
"""Install Detectron2 v0.6 for this Python without a compiler.

A Detectron2 that works is kept. Otherwise the published v0.6 sources are downloaded with pip,
checked against their hash, edited as listed in detectron2_patches.py, and installed as a
pure-Python wheel. Compiled operators come from torchvision.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import importlib.machinery
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from detectron2_patches import STUB_TEXT, PatchError
from detectron2_wheel import VERSION, build_wheel

SDIST_NAME = "pb1-detectron2"
SDIST_FILE = "pb1-detectron2-0.6.tar.gz"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "detectron2"
OLDEST_PYTHON = (3, 10)

# pip asks a source archive's build backend for metadata even to download it, and this archive's
# setup.py declares requirements that pip refuses. This stand-in for setuptools answers instead,
# so that nothing inside the archive is run before its hash is checked.
BACKEND = """
from pathlib import Path

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    info = Path(metadata_directory, "pb1_detectron2-0.6.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: pb1-detectron2\\nVersion: 0.6\\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    return info.name

class _Legacy:
    def __getattr__(self, name):
        return globals()[name]

__legacy__ = _Legacy()
"""

# Run in a child process: a half-imported package or a crash must not reach the installer.
PROBE = f"""
import importlib, importlib.metadata, importlib.util, json, os
spec = importlib.util.find_spec("detectron2")
report = {{"location": None, "version": "", "ours": False}}
if spec is not None and spec.origin:
    report["location"] = os.path.dirname(spec.origin)
    try:
        report["version"] = importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        pass
    stub = os.path.join(report["location"], "_C.py")
    if os.path.isfile(stub):
        with open(stub, encoding="utf-8") as file:
            report["ours"] = {STUB_TEXT!r} in file.read()
print(json.dumps(report), flush=True)
if report["location"]:
    for name in ("modeling", "data", "engine", "evaluation"):
        importlib.import_module("detectron2." + name)
"""


class InstallError(Exception):
    """Something the user can act on; the text is the whole message."""


@dataclass(frozen=True)
class Installed:
    """What a child process found; `error` is empty if Detectron2 works."""

    location: str | None
    version: str
    ours: bool
    error: str


def inspect_installed() -> Installed:
    """Import Detectron2 in a child process, away from the current folder."""
    with tempfile.TemporaryDirectory() as empty:
        child = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=empty
        )
    lines = child.stdout.splitlines()
    if not lines:
        raise InstallError(f"cannot run {sys.executable}: {last_line(child.stderr)}")
    report = json.loads(lines[0])
    error = ""
    if child.returncode != 0:
        error = last_line(child.stderr) or f"the import ended with status {child.returncode}"
    return Installed(report["location"], report["version"], report["ours"], error)


def last_line(text: str) -> str:
    """Return the line of a program's output that contains the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error:")]
    return (errors or lines or [""])[-1]


def has_module(name: str) -> bool:
    """Whether a module is installed; asks past setuptools' hook, which reacts to a look at pip."""
    return importlib.machinery.PathFinder.find_spec(name) is not None


def check_environment() -> None:
    """Raise InstallError if this Python cannot take a Detectron2."""
    if sys.version_info < OLDEST_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        raise InstallError(f"Python 3.10 or newer is needed, this is {found} ({sys.executable})")
    if not has_module("pip"):
        raise InstallError(
            f"{sys.executable} has no pip; add it with `{sys.executable} -m ensurepip`"
        )


def check_torch() -> None:
    """Raise InstallError if torch or torchvision is missing."""
    for name in ("torch", "torchvision"):
        if not has_module(name):
            raise InstallError(
                f"{name} is not installed for {sys.executable}; first run "
                f"`{sys.executable} -m pip install -c constraints.txt -e .`"
            )


def run_pip(*args: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run pip in this interpreter, with `path` first on the module path."""
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    if path is not None:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), env.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pip", *args]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if "No space left on device" in done.stdout + done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), tempfile.gettempdir())
    return done


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_hash(archive: Path) -> None:
    """Remove the archive and raise InstallError if it is not the published one."""
    found = sha256(archive)
    if found != SDIST_SHA256:
        archive.unlink()
        raise InstallError(
            f"{archive} has sha256 {found} instead of {SDIST_SHA256}; removed it, run again"
        )


def fetch_sdist(cache: Path) -> Path:
    """Return the checked archive of sources, downloading it if the cache has none."""
    archive = cache / SDIST_FILE
    if not archive.exists():
        print(f"Downloading {SDIST_NAME} 0.6 (0.5 MB) ...", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as folder:
            os.replace(download(Path(folder), archive), archive)
    check_hash(archive)
    return archive


def download(folder: Path, archive: Path) -> Path:
    """Download the archive into `folder` with pip; `archive` is only named in errors."""
    stand_in = folder / "backend" / "setuptools"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").write_text("")
    (stand_in / "build_meta.py").write_text(BACKEND)
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{SDIST_NAME}==0.6 --hash=sha256:{SDIST_SHA256}\n")
    options = "-q --use-pep517 --no-build-isolation --no-deps --require-hashes --no-binary :all:"
    done = run_pip(
        *["download", *options.split(), "-d", str(folder), "-r", str(requirement)],
        path=stand_in.parent,
    )
    output = done.stdout + done.stderr
    if "DO NOT MATCH THE HASHES" in output:
        got = next((line.split()[-1] for line in output.splitlines() if "Got" in line), "unknown")
        raise InstallError(f"the download has sha256 {got} instead of {SDIST_SHA256}; not used")
    if done.returncode != 0 or not (folder / SDIST_FILE).exists():
        raise InstallError(
            f"cannot download {SDIST_NAME}==0.6 (pip: {last_line(output)}); "
            f"connect to a network, or put a copy at {archive}, and run again"
        )
    return folder / SDIST_FILE


def install_wheel(wheel: Path) -> None:
    """Install the wheel into the running interpreter and check that it imports."""
    print(f"Installing Detectron2 {VERSION} ...", flush=True)
    done = run_pip(*["install", "-q", "--no-deps", "--no-index", "--force-reinstall", str(wheel)])
    if done.returncode != 0:
        raise InstallError(f"pip cannot install {wheel}: {last_line(done.stdout + done.stderr)}")
    installed = inspect_installed()
    if installed.location is None:
        raise InstallError(f"pip installed {wheel}, but {sys.executable} does not find it")
    if installed.error:
        raise InstallError(f"the installed Detectron2 does not import: {installed.error}")
    print(f"Detectron2 {installed.version} is installed in {installed.location}.")


def keep_installed(installed: Installed) -> bool:
    """Whether the Detectron2 found here stays; raises InstallError if it is broken."""
    if installed.location is None:
        return False
    if installed.ours and (installed.error or installed.version != VERSION):
        return False  # an interrupted or older installation of this script
    if installed.error:
        raise InstallError(
            f"Detectron2 in {installed.location} does not import: {installed.error}; repair it, "
            "or replace it with `--force`"
        )
    print(f"Detectron2 {installed.version} in {installed.location} works; keeping it.")
    return True


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: .venv/bin/python tools/install_detectron2.py",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace whatever Detectron2 is installed"
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=CACHE,
        metavar="DIR",
        help=f"where {SDIST_FILE} is kept or found (default: .cache/detectron2)",
    )
    parser.add_argument(
        "--wheel-only",
        type=Path,
        metavar="DIR",
        help="write the wheel into DIR and install nothing",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Build and install the wheel. Raises: InstallError, PatchError, OSError."""
    check_environment()
    if args.wheel_only is not None:
        print(build_wheel(fetch_sdist(args.cache_dir), args.wheel_only))
        return
    check_torch()
    if not args.force and keep_installed(inspect_installed()):
        return
    wheel = build_wheel(fetch_sdist(args.cache_dir), args.cache_dir)
    install_wheel(wheel)


def main(argv: list[str] | None = None) -> int:
    """Run the tool, and return the exit code."""
    args = parse_args(argv)
    try:
        run(args)
    except InstallError as error:
        message = str(error)
    except PatchError as error:
        message = f"the sources are not the published ones: {error}"
    except OSError as error:
        if error.errno == errno.ENOSPC:
            message = "the disk is full; free about 100 MB and run again"
        else:
            message = f"{error}"
    else:
        return 0
    print(f"install_detectron2: error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
