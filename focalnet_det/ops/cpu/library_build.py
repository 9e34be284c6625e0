"""Compile the kernels in ``csrc``: the compiler, its flags, and a first try of what it makes.

Whatever goes wrong here is a :class:`BuildError`, whose text says what and what to do.
"""

import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from . import capabilities

SOURCE = Path(__file__).parent / "csrc" / "kernels.cpp"
COMPILERS = ("g++", "clang++", "c++")
# For the CPU at hand, the first that the compiler takes.
NATIVE = (("-march=native",), ("-mcpu=native",))
# GCC's predictive commoning trades loads, which are free here, for registers, which are not.
FLAGS = ("-O3", "-fno-predictive-commoning", "-fno-math-errno", "-std=c++17", "-fPIC", "-shared")
# Seconds until a compiler, or what it made, counts as hanging.
COMPILE_SECONDS, ANSWER_SECONDS = 120, 30

INSTALL = f"Install a C++ compiler ({' or '.join(COMPILERS[:2])}), or name one in CXX"
CHOOSE = "Let CXX name a C++17 compiler that works, or unset it"

# Loads a library and compares GELU(1) in both types. Instructions that the CPU lacks, sanitizers
# and broken linkers end a process, which must not be that of the user.
_PROBE = """
import sys
sys.path[:] = [folder for folder in sys.path if folder]
import ctypes
try:
    functions = ctypes.CDLL(sys.argv[1])
    functions.focalnet_set_threads(None)
    for sixteen, kind, one, least, most in (
        (0, ctypes.c_float, 1.0, 0.84, 0.843), (1, ctypes.c_uint16, 0x3F80, 0x3F56, 0x3F58)
    ):
        values, out = (kind * 64)(*[one] * 64), (kind * 64)()
        # The struct of the function: x, bias, valid, out; rows, c, threads, sixteen.
        pointers = (ctypes.addressof(values), 0, 0, ctypes.addressof(out))
        functions.focalnet_gelu((ctypes.c_long * 8)(*pointers, 1, 64, 1, sixteen))
        if not all(least <= value <= most for value in out):
            raise ValueError(f"GELU(1) is {out[0]}")
except Exception as error:
    print(error)
    sys.exit(3)
"""


class BuildError(RuntimeError):
    """There is no library; the text says why, and :attr:`advice` what to do."""

    def __init__(self, reason: str, advice: str = CHOOSE) -> None:
        # Names of files and what compilers write need not be text.
        super().__init__(reason.encode(errors="backslashreplace").decode())
        self.advice = advice


class HangingError(BuildError):
    """A command has not ended in time."""


def find_compiler() -> list[str]:
    """Return the command of the compiler: that of ``CXX``, else the first of :data:`COMPILERS`.

    Raises: BuildError if there is none.
    """
    if os.name != "posix":
        raise BuildError("the native kernels need a POSIX system", "Use another path")
    text = os.environ.get("CXX", "")
    try:
        chosen = shlex.split(text)
    except ValueError as error:
        raise BuildError(f"CXX={text} cannot be read: {error}") from None
    for command in [chosen] if chosen else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    names = chosen[0] if chosen else ", ".join(COMPILERS)
    raise BuildError(f"there is no C++ compiler ({names})", INSTALL)


def machine_flags() -> tuple[tuple[str, ...], ...]:
    """Return flags that say which CPU to build for; each is tried until one is taken.

    Raises: BuildError if ``FOCALNET_DET_CPU`` names a CPU that can do more than the one at hand.
    """
    level = capabilities.chosen_level()
    if level is None:
        return NATIVE
    if lacking := capabilities.missing(level):
        name = os.environ[capabilities.VARIABLE]
        raise BuildError(
            f"{capabilities.VARIABLE}={name} names a CPU with {', '.join(lacking)}, which this "
            "one lacks",
            f"Unset {capabilities.VARIABLE} or name less",
        )
    return (level.flags,)


def build_key(compiler: list[str]) -> str:
    """Return a hash of the sources, the compiler, its flags and the CPU.

    Raises: BuildError if the compiler does not run or the sources cannot be read.
    """
    machine = machine_flags()
    target = capabilities.fingerprint() if machine == NATIVE else os.uname().machine
    try:
        sources = [file.read_bytes() for file in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    except OSError as error:
        raise BuildError(
            f"the sources cannot be read: {error}", "Install the package again"
        ) from None
    version = run([*compiler, "--version"], ANSWER_SECONDS)
    parts = [repr(sources), repr(machine), repr(FLAGS), *compiler, version, target]
    return hashlib.sha256("\n".join(parts).encode(errors="backslashreplace")).hexdigest()[:20]


def compile_library(file: Path, compiler: list[str]) -> None:
    """Compile the kernels to ``file``, and try them in a process of their own.

    Raises: BuildError if there is no library then, or it does not work.
    """
    errors = []
    for machine in machine_flags():
        flags = [*machine, *FLAGS]
        command = [*compiler, *flags, str(SOURCE), "-o", str(file)]
        try:
            run(command, COMPILE_SECONDS)
        except HangingError:
            raise
        except BuildError as error:
            errors.append(error)
            continue
        if not file.is_file():
            raise BuildError(f"{compiler[0]} reports success but has made no library")
        _probe(file, compiler[0])
        return
    raise errors[0]


def run(command: list[str], seconds: float) -> str:
    """Run a command and all that it starts for at most some seconds.

    Returns: what it writes to its standard output.
    Raises: BuildError if it cannot be started or fails.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"LC_ALL": "C"},
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from None
    with process:
        try:
            written = process.communicate(timeout=seconds)
        except BaseException as error:
            # A compiler starts others, which hold its pipes open.
            _end(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise HangingError(f"{command[0]} has not ended after {seconds:g} s") from None
            raise
    out, errors = (text.decode(errors="backslashreplace") for text in written)
    if process.returncode:
        raise BuildError(f"{command[0]} {_failure(process.returncode, errors or out)}")
    return out


def _end(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        process.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _failure(code: int, written: str) -> str:
    """Return how a command failed, in one line."""
    if code < 0:
        return f"is ended by {_signal(-code)}"
    lines = [line.strip(" .") for line in written.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()] or lines[-1:]
    return f"fails: {telling[0][:200]}" if telling else f"fails with code {code}"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _probe(file: Path, compiler: str) -> None:
    """Try a library in a process of its own.

    Raises: BuildError if it does not load, ends its process or is wrong.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        return  # that program would start itself
    try:
        done = subprocess.run(
            [sys.executable, "-S", "-c", _PROBE, str(file)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ANSWER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"the kernels that {compiler} built do not end") from None
    except OSError:
        return
    # Any other code is from a Python that did not come as far.
    if done.returncode < 0:
        raise BuildError(
            f"the kernels that {compiler} built end their process by {_signal(-done.returncode)}"
        )
    if done.returncode == 3:
        reason = done.stdout.decode(errors="backslashreplace").strip()
        raise BuildError(f"the kernels that {compiler} built do not work: {reason[:300]}")
