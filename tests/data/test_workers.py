"""Loader processes outlive signals to the whole job, end with their parent, and leave nothing."""

import signal
import time
from pathlib import Path

import pytest

from tests.helpers.processes import run_program

SCRIPT = """
import os, signal, sys, time
import torch
from torch.utils.data import DataLoader, Dataset
from focalnet_det.data.workers import protect_workers

class Numbers(Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        return torch.tensor([index, os.getpid()])

batches = iter(protect_workers(DataLoader(Numbers(), num_workers=2)))
pids = {int(next(batches)[0, 1]) for _ in range(4)}
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    for pid in pids:
        # By another process than their parent: theirs is to be obeyed.
        os.spawnvp(os.P_WAIT, "kill", ["kill", f"-{int(number)}", str(pid)])
time.sleep(0.5)
rest = [int(batch[0, 0]) for batch in batches]
print(rest == list(range(4, 1000)), len(pids))
batches = iter(protect_workers(DataLoader(Numbers(), num_workers=2)))
kept = [next(batches) for _ in range(4)]
print(*(int(batch[0, 1]) for batch in kept), sep="\\n")
sys.stdout.flush()
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
# The loader is alive when Python ends.
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs signal.sigwaitinfo")
@pytest.mark.parametrize("end", ["left", "killed"])
def test_signals_do_not_end_loader_processes(end: str, tmp_path: Path) -> None:
    program, folder = tmp_path / "program.py", tmp_path / "temporary"
    program.write_text(SCRIPT)
    folder.mkdir()
    result = run_program(program, end, timeout=120, TMPDIR=str(folder))
    assert result.stderr == ""
    assert result.returncode == (0 if end == "left" else -signal.SIGKILL)
    said, *pids = result.stdout.splitlines()
    assert said == "True 2"
    deadline = time.monotonic() + 60
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in pids if is_running(pid)] == []
    if end == "left":
        assert list(folder.iterdir()) == []


def is_running(pid: str) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
