"""A process that has the imports done and forks itself for each program; see processes.py.

Requests and replies are lines of JSON on standard input and output.
"""

import atexit
import functools
import json
import os
import runpy
import sys
import tempfile
import threading
import traceback
from importlib.util import find_spec

import matplotlib.pyplot  # noqa: F401
from torch.multiprocessing import start_processes

import focalnet_det
from focalnet_det import supervise

if find_spec("detectron2") is not None:
    import focalnet_det.engine.main
    import focalnet_det.evaluation  # noqa: F401


def serve() -> dict:
    """Answer requests until there are no more; return in a forked process, with its program."""
    replies = os.fdopen(os.dup(1), "w")
    print(json.dumps("ready"), file=replies, flush=True)
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "poll" in request:
            ended, status = os.waitpid(request["poll"], os.WNOHANG)
            reply = os.waitstatus_to_exitcode(status) if ended else None
        else:
            reply = os.fork()
            if reply == 0:
                return request
        print(json.dumps(reply), file=replies, flush=True)
    sys.exit()


def become(program: dict) -> None:
    """Take the place that a process started by itself would have."""
    os.setsid()
    streams = [os.open(os.devnull, os.O_RDONLY)]
    streams += [os.open(path, os.O_WRONLY | os.O_APPEND) for path in program["outputs"]]
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, 64)
    os.chdir(program["folder"])
    os.environ.clear()
    os.environ.update(program["environment"])
    tempfile.tempdir = None  # of TMPDIR, which may be another now
    if "FORK_PROCESSES" in os.environ:
        supervise.start_processes = functools.partial(start_processes, start_method="fork")
    sys.argv = program["words"]
    sys.path[0] = os.path.dirname(program["words"][0])


def run(path: str) -> int:
    """Run a program; return the exit status that Python would have given it."""
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    chosen = serve()
    become(chosen)
    status = run(chosen["words"][0])
    # What Python does at its end, but for taking hundreds of modules apart: that takes seconds.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
