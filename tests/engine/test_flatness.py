"""A long run takes no more of anything than a short one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

CONFIG = "configs/COCO-InstanceSegmentation/mask_rcnn_focalnet_nano_fpn_small.py"
# With as many evaluated images: 4 of them every 4 iterations.
ITERATIONS = int(os.environ.get("SOAK_ITERATIONS", "2000"))


def usage(process: int) -> dict[str, float]:
    """Memory (MiB), descriptors, threads and children of a process."""
    proc = Path(f"/proc/{process}")
    status = dict(
        line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line
    )
    children = (proc / f"task/{process}/children").read_text().split()
    return {
        "memory": int(status["VmRSS"].split()[0]) / 1024,
        "descriptors": len(list((proc / "fd").iterdir())),
        "threads": int(status["Threads"]),
        "children": len(children),
        "shared memory": len(list(Path("/dev/shm").glob("torch_*"))),
    }


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc, as Linux has it")
def test_nothing_grows(shapes: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/train_net.py")]
    command += ["--config-file", str(ROOT / CONFIG), "--output", str(tmp_path / "run")]
    command += ["--coco-json", str(shapes / "annotations/instances_train.json")]
    command += ["--images", str(shapes / "images/train")]
    command += ["--val-json", str(shapes / "annotations/instances_val.json")]
    command += ["--val-images", str(shapes / "images/val")]
    command += [f"schedule.iterations={ITERATIONS}", "schedule.warmup_iterations=0"]
    command += ["train.period_unit=iterations", "train.eval_period=4", "train.log_iterations=2"]
    command += ["train.checkpoint_period=8", "dataloader.train.batch_size=2", "train.device=cpu"]
    command += ["dataloader.train.augmentations.short_sides=[64]", "train.keep_best=bbox/AP"]
    command += ["dataloader.train.augmentations.crop=64", "dataloader.train.num_workers=2"]
    command += ["dataloader.test.0.augmentations.short_side=64"]
    folders = tmp_path / "temporary"
    folders.mkdir()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folders)},
    )
    lines = tmp_path / "run/metrics.json"
    seen: dict[int, dict[str, float]] = {}
    while process.poll() is None:
        done = last_iteration(lines)
        # Between evaluations, whose loaders have processes of their own.
        if done >= 0 and done % 4 == 1 and done not in seen:
            try:
                seen[done] = usage(process.pid)
            except OSError:
                break  # it has just ended
        time.sleep(0.05)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    # PyTorch's own cache is one folder for all processes.
    left = [path.name for path in folders.iterdir() if not path.name.startswith("torchinductor")]
    assert left == []
    points = [seen[i] for i in sorted(seen) if i > 4]
    third = max(1, len(points) // 3)
    early, late = points[third : 2 * third] or points[:1], points[-third:]
    for name in ("descriptors", "threads", "children", "shared memory"):
        # A few come and go; one an evaluation would be many by the end.
        assert min(p[name] for p in late) <= max(p[name] for p in early) + 4, name
    memory = [sum(p["memory"] for p in part) / len(part) for part in (early, late)]
    print(f"{ITERATIONS} iterations: memory {memory[0]:.0f} then {memory[1]:.0f} MiB; {late[-1]}")
    assert memory[1] < 1.05 * memory[0] + 20


def last_iteration(path: Path) -> int:
    """Of a file of metrics, -1 if there is none."""
    try:
        return int(json.loads(path.read_text().splitlines()[-1])["iteration"])
    except (OSError, ValueError, IndexError):
        return -1
