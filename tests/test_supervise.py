"""Several processes: signals reach each once, and the first that fails ends all, in one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from focalnet_det.supervise import Job, Outcome
from tests.helpers.paths import ROOT

# What each process does, by the name on the command line.
SCRIPT = """
import os, signal, sys, time
from focalnet_det.supervise import run_processes

def work(index, how):
    received = []
    if how == "signal":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: received.append(number))
    print(os.getpid(), flush=True)
    if how == "signal":
        while not received:
            time.sleep(0.05)
        time.sleep(1)
        print("received", len(received), flush=True)
        sys.exit(130 if received == [signal.SIGINT] else 75)
    if how == "stuck":
        # Asked to end, the other process notes it, and waits on, as in a collective.
        signal.signal(signal.SIGTERM, lambda *_: None)
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)
    if how == "crash" and index == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "leave" and index == 1:
        os._exit(0)
    if how == "both":
        raise ValueError("train.json does not exist.")
    if how == "cause":
        if index == 0:
            raise RuntimeError("[gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:12345")
        time.sleep(0.3)
        raise ValueError("a.jpg, row 3: broken.")
    time.sleep(1000)

if __name__ == "__main__":
    run_processes(work, sys.argv[1], 2)
"""


def start(tmp_path: Path, how: str) -> subprocess.Popen[str]:
    (tmp_path / "script.py").write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        # Where the tests run in the background of a shell, it is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


DIED = {
    "stuck": (137, "process 1 of 2 was killed by SIGKILL: out of memory?"),
    "crash": (139, "process 1 of 2 was killed by SIGSEGV, a crash in native code."),
    "leave": (1, "process 1 of 2 ended with exit code 0 without a message."),
    "cause": (1, "process 1 of 2: a.jpg, row 3: broken."),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    ["stuck", "cause", *(pytest.param(how, marks=pytest.mark.soak) for how in ("crash", "leave"))],
)
def test_one_failure_ends_all_with_one_line(how: str, tmp_path: Path) -> None:
    process = start(tmp_path, how)
    pids, errors = process.communicate(timeout=240)
    code, sentence = DIED[how]
    assert errors.splitlines() == [
        f"error: {sentence} The job has ended; continue a training with --resume."
    ]
    assert process.returncode == code
    assert len(pids.split()) == 2
    for pid in map(int, pids.split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


@pytest.mark.slow
def test_what_all_say_is_said_once(tmp_path: Path) -> None:
    process = start(tmp_path, "both")
    assert process.communicate(timeout=240)[1] == "error: train.json does not exist.\n"
    assert process.returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "to_all"),
    [
        (signal.SIGTERM, 75, False),
        (signal.SIGINT, 130, True),
        pytest.param(signal.SIGTERM, 75, True, marks=pytest.mark.soak),
        pytest.param(signal.SIGINT, 130, False, marks=pytest.mark.soak),
        pytest.param(signal.SIGUSR1, 75, True, marks=pytest.mark.soak),
        pytest.param(signal.SIGUSR1, 75, False, marks=pytest.mark.soak),
    ],
)
def test_signals_reach_every_process_once(
    number: signal.Signals, code: int, to_all: bool, tmp_path: Path
) -> None:
    """The signal goes to the first process alone, or to its whole group."""
    process = start(tmp_path, "signal")
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline().strip().isdecimal()
    (os.killpg if to_all else os.kill)(process.pid, number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == code
    said = f"{number.name}: stopping as soon as the state is saved. A second signal stops at once."
    assert errors.split("\n") == ["", said, ""]
    assert output.splitlines() == ["received 1"] * 2


class Stopped:
    """A process that has ended."""

    sentinel = 0

    def __init__(self, exitcode: int) -> None:
        self.exitcode = exitcode

    def is_alive(self) -> bool:
        return False


def verdict(*outcomes: Outcome | None, signals: tuple[int, ...] = ()) -> tuple[int, str]:
    job = Job([Stopped(0)] * len(outcomes), [])
    job.signals = list(signals)
    job.outcomes = {i: outcome for i, outcome in enumerate(outcomes) if outcome is not None}
    return job.verdict(range(4, 4 + len(outcomes)), 8)


def test_codes_of_jobs_that_did_not_fail() -> None:
    done, stopped, interrupted = Outcome(0, 1.0), Outcome(75, 2.0), Outcome(130, 3.0)
    assert verdict(done, done) == (0, "")
    assert verdict(stopped, done) == (75, "")
    assert verdict(interrupted, interrupted) == (130, "")
    # Those that do not leave after a second signal are killed.
    assert verdict(None, stopped, signals=(signal.SIGTERM,) * 2) == (75, "")
    assert verdict(None, None, signals=(signal.SIGINT,) * 2) == (130, "")


def test_ranks_are_those_of_the_whole_job() -> None:
    late, early = Outcome(1, 9.0, "late"), Outcome(1, 5.0, "early")
    assert verdict(late, early)[1].startswith("process 5 of 8: early.")
    lost = Outcome(1, 1.0, "Continue with --resume.", is_consequence=True)
    assert verdict(lost, late)[1].startswith("process 5 of 8: late.")
    assert verdict(lost, None)[1] == "process 4 of 8: Continue with --resume. The job has ended."
    # All were killed: they did not say the same, their parent does.
    killed = Outcome(137, 1.0, "was killed by SIGKILL", exited_silently=True)
    assert verdict(killed, killed)[1].startswith("process 4 of 8 was killed by SIGKILL.")


@pytest.mark.parametrize(
    ("exitcode", "signals", "code", "sentence"),
    [
        (-signal.SIGTERM, [signal.SIGTERM], 75, ""),
        (-signal.SIGUSR1, [signal.SIGUSR1], 75, ""),
        (-signal.SIGINT, [signal.SIGINT], 130, ""),
        (130, [signal.SIGINT, signal.SIGINT], 130, ""),
        (-signal.SIGTERM, [], 143, "was killed by SIGTERM"),
        (-signal.SIGABRT, [], 134, "was killed by SIGABRT"),
        (75, [], 75, "ended with exit code 75 without a message"),
    ],
)
def test_deaths(exitcode: int, signals: list[int], code: int, sentence: str) -> None:
    job = Job([Stopped(exitcode)], [])
    job.signals = signals
    now = time.time()
    outcome = job.exit_outcome(0)
    assert (outcome.code, outcome.message) == (code, sentence)
    assert abs(outcome.time - now) < 60


def test_processes_that_lost_one_that_stopped_have_not_failed() -> None:
    """In an evaluation one stops between two images while the other waits for its results."""
    stopped = Outcome(75, 1.0)
    lost = Outcome(1, 2.0, "Another process of this job has ended.", is_consequence=True)
    assert verdict(stopped, lost, signals=(signal.SIGTERM,)) == (75, "")
    assert verdict(stopped, lost)[0] == 1
    assert verdict(stopped, Outcome(1, 3.0, "a.jpg: broken."), signals=(signal.SIGTERM,))[0] == 1
