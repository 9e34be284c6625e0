"""The Slurm script with stand-ins for srun and scontrol: when it restarts, and when it requeues."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

# The nth call ends with the nth code of CODES; "signal" waits for SIGUSR1 and ends with 75.
SRUN = """#!/bin/bash
trap 'echo stopping >> calls; exit 75' USR1
SLURM_NODEID=1 PYTHON=echo "${@:2}" >> calls
code=$(sed -n "$(grep -c train_net calls)p" <<< "${CODES// /$'\\n'}")
[ "$code" = signal ] || exit "$code"
touch waiting
while :; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo node7; echo node8; else echo "$*" >> requeued; fi
"""
LINE = (
    "tools/train_net.py --resume --num-gpus 4 --num-machines 2 --machine-rank 1 "
    "--dist-url tcp://node7:29500 --config-file a b.py"
)


def start(folder: Path, codes: str) -> subprocess.Popen[str]:
    (folder / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    slurm = {
        "SUBMIT_DIR": folder, "JOB_NODELIST": "node[7-8]", "JOB_ID": 12, "JOB_NUM_NODES": 2,
        "GPUS_ON_NODE": 4,
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", str(ROOT / "tools/slurm_train.sh"), "--config-file", "a b.py"],
        env={
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "CODES": codes,
            "PYTHON": "echo",
            **{f"SLURM_{name}": str(value) for name, value in slurm.items()},
        },
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("codes", "calls", "code", "requeued"),
    [
        ("0", 1, 0, False),
        ("1", 1, 1, False),
        ("75", 1, 75, True),
        ("130", 1, 130, False),
        ("137 0", 2, 0, False),
        ("139 75", 2, 75, True),
        ("137 137 137 137 0", 4, 137, False),
    ],
)
def test_exit_codes(codes: str, calls: int, code: int, requeued: bool, tmp_path: Path) -> None:
    script = start(tmp_path, codes)
    script.communicate(timeout=60)
    assert script.returncode == code
    assert (tmp_path / "calls").read_text().splitlines() == [LINE] * calls
    assert (tmp_path / "requeued").exists() == requeued


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_notice_of_the_end_is_passed_on(number: int, tmp_path: Path) -> None:
    script = start(tmp_path, "signal")
    until = time.monotonic() + 60
    while not (tmp_path / "waiting").exists() and time.monotonic() < until:
        time.sleep(0.05)
    script.send_signal(number)
    script.communicate(timeout=60)
    assert script.returncode == 75
    assert (tmp_path / "calls").read_text().splitlines() == [LINE, "stopping"]
    assert (tmp_path / "requeued").read_text() == "requeue 12\n"
