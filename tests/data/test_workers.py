"""Loader processes outlive signals to the whole job, end with their parent, and leave nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

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
sys.stdout.flush()
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
# The loader is alive when Python ends.
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs signal.sigwaitinfo")
@pytest.mark.parametrize("end", ["left", "killed"])
def test_signals_do_not_end_loader_processes(end: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, end],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    # All holders of the pipes have ended, or this would not have returned: the loader processes.
    assert result.stderr == ""
    assert result.returncode == (0 if end == "left" else -signal.SIGKILL)
    assert result.stdout == "True 2\n"
    if end == "left":
        assert list(tmp_path.iterdir()) == []
