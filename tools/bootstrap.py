"""Make an environment complete: what `make` runs before every target (standard library only).

In `.venv`, which this file makes, everything is installed at the tested versions. In any other
environment the torch, torchvision and numpy found there stay as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OWN_ENV = ROOT / ".venv"
INPUTS = (
    "setup.py",
    "constraints.txt",
    "pyproject.toml",
    "tools/install_detectron2.py",
    "tools/detectron2_wheel.py",
    "tools/detectron2_patches.py",
)
GB = 10**9
FREE_FOR_ENV = 8 * GB
FREE_FOR_DOWNLOADS = 4 * GB  # pip keeps the wheels in the temporary folder while it works
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 4)
KEPT = ("torch", "torchvision", "numpy")
# Seven tenths of what is unpacked, and hardly any Python to compile: a second pip does it.
GPU_LIBRARIES = ("cuda-", "nvidia-", "triton")
# As compileall's -x reads it: two modules of five. Python compiles those that it meets all
# the same when it imports them.
RARELY_IMPORTED = (
    r"/site-packages/(.*/)?(tests?|testing|benchmarks?|_vendor|_inductor|onnx|combinatorics|physics|stats"
    r"|f2py|distutils|fontTools|networkx|pip|pygments|setuptools)/"
)

# Asked of the environment's own Python.
PROBE = f"""
import importlib.metadata as metadata, importlib.util, json, sys
versions = {{}}
for name in {KEPT!r}:
    try:
        versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
pip = importlib.util.find_spec("pip") is not None
print(json.dumps({{"python": sys.version_info[:3], "pip": pip, "versions": versions}}))
"""


class SetupError(Exception):
    """Something the user can act on; the text is the whole message."""


@dataclass(frozen=True)
class Environment:
    """What an environment holds; `versions` has the packages of KEPT that are installed."""

    python: tuple[int, ...]
    pip: bool
    versions: dict[str, str]


def say(text: str) -> None:
    """Print a message immediately."""
    print(text, flush=True)


def fingerprint() -> str:
    """Hash the files that determine what is installed."""
    digest = hashlib.sha256()
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def stamp_of(env: Path) -> Path:
    """Return the file that marks an environment as complete."""
    return env / (".ok" if env == OWN_ENV else ".focalnet_det.ok")


def python_of(env: Path) -> Path:
    """Return the Python interpreter of an environment."""
    return env / "bin" / "python"


def is_complete(env: Path, tests: bool) -> bool:
    """Return whether an environment is complete for the current files of this checkout."""
    stamp = stamp_of(env)
    if not stamp.is_file() or not os.access(python_of(env), os.X_OK):
        return False
    return stamp.read_text() in {stamp_text(True), stamp_text(tests)}


def stamp_text(tests: bool) -> str:
    """Return the content of the stamp file."""
    # Includes the checkout, because the editable installation points there.
    return f"{fingerprint()} {ROOT}{' with tests' if tests else ''}\n"


def probe(env: Path) -> Environment | None:
    """Return the versions in an environment; None if its Python does not run."""
    try:
        done = subprocess.run(
            [str(python_of(env)), "-c", PROBE], capture_output=True, text=True, cwd=env
        )
    except OSError:
        return None
    if done.returncode != 0:
        return None
    report = json.loads(done.stdout)
    return Environment(tuple(report["python"]), report["pip"], report["versions"])


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Raise SetupError if a disk has too little free space."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SetupError(
            f"{folder} has {free / GB:.1f} GB free, but {what} needs about {needed // GB} GB; "
            "free some space and run make again"
        )


def make_own_env() -> Environment:
    """Create `.venv`, or keep the one that an earlier run began."""
    found = probe(OWN_ENV)
    if found is None or not found.pip:
        if find_spec("venv") is None or find_spec("ensurepip") is None:
            version = f"{sys.version_info[0]}.{sys.version_info[1]}"
            raise SetupError(
                f"{sys.executable} cannot make virtual environments; on Debian and Ubuntu run "
                f"`sudo apt install python{version}-venv`, then make again"
            )
        check_disk(ROOT, FREE_FOR_ENV, "the environment")
        say(f"Making .venv with Python {sys.version.split()[0]} ...")
        call([sys.executable, "-m", "venv", "--clear", str(OWN_ENV)])
        found = probe(OWN_ENV)
    elif "torch" not in found.versions:
        check_disk(ROOT, FREE_FOR_ENV, "the environment")
    if found is None:
        raise SetupError(f"{python_of(OWN_ENV)} does not run; remove .venv and run make again")
    return found


def check_foreign_env(env: Path) -> Environment:
    """Return the versions in a user-supplied environment. Raises: SetupError if unusable."""
    found = probe(env)
    if found is None:
        raise SetupError(f"{python_of(env)} does not run; name another with `make ENV_DIR=...`")
    torch = found.versions.get("torch", "")
    if torch and version_tuple(torch) < OLDEST_TORCH:
        raise SetupError(
            f"{env} has torch {torch}, 2.4 or newer is needed; deactivate this environment "
            "and make builds its own, .venv"
        )
    if not found.pip:
        raise SetupError(f"{env} has no pip; run `{python_of(env)} -m ensurepip`")
    say(f"Using {env} with its torch {torch or '(none yet)'} ...")
    return found


def version_tuple(version: str) -> tuple[int, ...]:
    """'2.14.1+cu130' -> (2, 14)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def call(command: list[str], env: dict[str, str] | None = None, quiet: bool = False) -> None:
    """Run a command; a quiet one shows its output only if it fails."""
    output = subprocess.PIPE if quiet else None
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=output, stderr=output, text=True)
    if done.returncode != 0:
        if quiet:
            print(done.stdout + done.stderr, file=sys.stderr)
        raise SetupError("the step above failed; solve that and run make again, it will resume")


def pip_environment() -> dict[str, str]:
    """Environment of pip, with a temporary folder that has room for its downloads."""
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    if shutil.disk_usage(tempfile.gettempdir()).free < FREE_FOR_DOWNLOADS:
        folder = ROOT / ".cache" / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        env["TMPDIR"] = str(folder)
    return env


def install(env: Path, found: Environment, tests: bool) -> None:
    """Install the package, what it (and its tests) need and Detectron2 into an environment."""
    if found.python < OLDEST_PYTHON:
        version = ".".join(map(str, found.python))
        raise SetupError(
            f"{env} has Python {version}, 3.10 or newer is needed; "
            + ("remove .venv" if env == OWN_ENV else "deactivate it")
            + " and run make again"
        )
    python = str(python_of(env))
    pip = [python, "-m", "pip", "install", "--quiet"]
    uncompiled = "."
    with constraints(env, found) as file:
        if env == OWN_ENV:
            call([*pip, "--upgrade", "pip", "setuptools", "wheel"], pip_environment(), quiet=True)
        if "torch" in found.versions:
            say("Installing what is missing ...")
        else:
            say("Installing torch and the other requirements: 2 minutes or more, 5.8 GB ...")
        package = ["--constraint", file, "--editable", ".[test]" if tests else "."]
        if env == OWN_ENV:
            # Pip compiles one file after the other.
            pip.append("--no-compile")
            if "torch" not in found.versions and install_on_two_cores(env, pip, package):
                uncompiled = "detectron2"
        call([*pip, *package], pip_environment(), quiet=True)
    call([python, "tools/install_detectron2.py"])
    if env == OWN_ENV:
        compile_modules(env, uncompiled)


def install_on_two_cores(env: Path, pip: list[str], package: list[str]) -> bool:
    """Install what a package needs: GPU libraries beside everything else and its bytecode.

    Pip unpacks one file after the other. What fails here is left to the call that follows.

    Returns: whether there was something to install beside the rest.
    """
    pinned = requirements(pip, package)
    libraries = [name for name in pinned if name.startswith(GPU_LIBRARIES)]
    others = [name for name in pinned if name not in libraries]
    if not libraries or not others:
        return False
    command = [*pip, "--no-deps"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*command, *libraries], cwd=ROOT, env=pip_environment(), **quiet):
        subprocess.run([*command, *others], cwd=ROOT, env=pip_environment(), **quiet)
        compile_modules(env, ".")
    return True


def requirements(pip: list[str], package: list[str]) -> list[str]:
    """Return the versions that pip would install for a package; none if it cannot tell."""
    command = [*pip, "--dry-run", "--report", "-", *package]
    done = subprocess.run(command, cwd=ROOT, env=pip_environment(), capture_output=True, text=True)
    if done.returncode != 0:
        return []
    found = [item for item in json.loads(done.stdout)["install"] if not item["is_direct"]]
    return [f"{item['metadata']['name']}=={item['metadata']['version']}" for item in found]


def compile_modules(env: Path, folder: str) -> None:
    """Write the bytecode of the modules that the commands here import, on all cores.

    `folder` is below that of all packages.
    """
    command = [str(python_of(env)), "-m", "compileall", "-q", "-j", "0", "-x", RARELY_IMPORTED]
    command += [str(packages / folder) for packages in env.glob("lib/python*/site-packages")]
    # It fails for templates and for files of other Python versions, which nobody imports.
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def constraints(env: Path, found: Environment) -> Iterator[str]:
    """Name of a constraints file: the tested versions, or those the user already has."""
    if env == OWN_ENV or "torch" not in found.versions:
        yield str(ROOT / "constraints.txt")
        return
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(f"{name}=={version}\n" for name, version in found.versions.items())
        file.flush()
        yield file.name


def main(argv: list[str] | None = None) -> int:
    """Run the tool, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("env", type=Path, help="folder of the environment, .venv to make one")
    parser.add_argument("--tests", action="store_true", help="also what only the tests need")
    args = parser.parse_args(argv)
    env, tests = (ROOT / args.env).absolute(), args.tests
    env = OWN_ENV if env.resolve() == OWN_ENV.resolve() else env
    try:
        if not is_complete(env, tests):
            stamp_of(env).unlink(missing_ok=True)
            found = make_own_env() if env == OWN_ENV else check_foreign_env(env)
            install(env, found, tests)
            stamp_of(env).write_text(stamp_text(tests))
            say(f"{env} is ready.")
    except (SetupError, OSError) as error:
        print(f"make: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make: interrupted; run make again to resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
