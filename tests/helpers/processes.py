"""Python programs as processes, without the seconds that their imports take in each."""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from tests.helpers.paths import ROOT

# Threads do not survive a fork.
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


class Server:
    """The process of fork_server.py, one for each process of tests."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.fork_server"],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        atexit.register(self._process.communicate)
        assert self._reply() == "ready"

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._reply()

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


server = cache(Server)


class Program:
    """A program in a process and a session of its own, with what ``subprocess.Popen`` has.

    Args:
        words: path of the program, and its arguments.
        merged: whether standard error goes where standard output goes.
        forks: whether processes of a job that it starts are forked, where what is tested is not
            their start; as people start them, each imports everything again.
        changes: variables of its environment that are others than here.
    """

    def __init__(
        self,
        *words: object,
        folder: Path = ROOT,
        merged: bool = False,
        forks: bool = False,
        **changes: str,
    ) -> None:
        changes |= {"FORK_PROCESSES": "1"} if forks else {}
        self.returncode: int | None = None
        self._outputs = [self._new_file() for _ in range(1 if merged else 2)]
        names = [stream.name for stream in self._outputs]
        self.pid: int = server().ask(
            {
                "words": [str(word) for word in words],
                "folder": str(folder),
                "outputs": [names[0], names[-1]],
                "environment": {**os.environ, **ENVIRONMENT, **changes},
            }
        )

    @staticmethod
    def _new_file() -> Any:
        return tempfile.NamedTemporaryFile("r", prefix="output")

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = server().ask({"poll": self.pid})
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float = 240) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked program", timeout)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def text(self) -> list[str]:
        """Return what it has written so far: standard output, and standard error if apart."""
        return [Path(stream.name).read_text() for stream in self._outputs]

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        self.wait(timeout)
        output, *error = self.text()
        return output, "".join(error)


def run_program(
    *words: object, timeout: float = 240, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; one that takes longer than that is killed, and an error."""
    program = Program(*words, **options)
    try:
        output, error = program.communicate(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)
        program.wait()
        raise
    return subprocess.CompletedProcess(list(words), program.wait(), output, error)


def in_two_processes(module: str, function: str, *arguments: object) -> None:
    """Call ``function(rank, *arguments)`` in two processes; arguments become texts."""
    done = run_program(ROOT / "tests/helpers/two_ranks.py", module, function, *arguments)
    assert done.returncode == 0, done.stderr
