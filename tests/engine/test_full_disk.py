"""A disk that is full, at whichever write: one message, and the run goes on from there."""

import contextlib
import errno
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from detectron2.utils.events import JSONWriter, TensorboardXWriter

from focalnet_det import atomic
from focalnet_det.engine.checkpoints import newest_whole, write_checkpoint
from focalnet_det.errors import read_failure
from tests.helpers import toy_training as toy
from tests.helpers.processes import run_program
from tests.helpers.toy_runs import OPTIONS, assert_same_end, save_pictures_without_drawing


class Disk:
    """Fails at one write, the ``full_at``-th of a run."""

    def __init__(self) -> None:
        self.full_at = 0
        self.writes = 0
        self.hit = ""

    def write(self, name: str) -> None:
        self.writes += 1
        if self.writes == self.full_at:
            self.hit = name
            raise OSError(errno.ENOSPC, "No space left on device", name)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    save_pictures_without_drawing(monkeypatch)
    disk = Disk()
    replacing, write = atomic.replacing, JSONWriter.write

    @contextlib.contextmanager
    def limited(path: Any, **options: Any) -> Iterator[Path]:
        with replacing(path, **options) as temporary:
            yield temporary
            disk.write(str(path))

    def write_line(self: JSONWriter) -> None:
        disk.write("metrics.json")
        write(self)

    for module in list(sys.modules.values()):
        if getattr(module, "replacing", None) is replacing:
            monkeypatch.setattr(module, "replacing", limited)
    monkeypatch.setattr(JSONWriter, "write", write_line)
    return disk


def test_full_at_every_write(disk: Disk, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy.run(tmp_path / "whole", **OPTIONS)
    writes = disk.writes
    assert writes > 25
    hits = set()
    for full_at in range(1, writes + 1):
        folder = tmp_path / f"run{full_at}"
        disk.writes, disk.full_at, disk.hit = 0, full_at, ""
        caplog.clear()
        message = ""
        try:
            toy.run(folder, **OPTIONS)
        except OSError as error:
            message = read_failure(error).summary()
        if message:
            assert "No space left" in message, disk.hit
            assert Path(disk.hit).name in message
            assert message.count("--resume") == 1, message
        else:
            # Only what is optional may fail without ending the run.
            assert "Could not create" in caplog.text, disk.hit
        hits.add(Path(disk.hit).name)
        assert not list(folder.glob(".*.tmp"))
        if folder.exists() and list(folder.glob("model_00*.pth")):
            assert newest_whole(folder) is not None
        disk.full_at = 0
        toy.run(folder, **OPTIONS, resume=True)
        assert_same_end(folder, tmp_path / "whole")
    assert {"model_final.pth", "model_best.pth", "model_ema.pth", "last_checkpoint"} <= hits
    assert {"metrics.json", "results.json", "run.json", "curves.png"} <= hits


def test_tensorboard_is_optional(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(self: TensorboardXWriter) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorboardXWriter, "write", fails)
    toy.run(tmp_path, iterations=4)
    assert caplog.text.count("Disabled TensorBoard") == 1
    assert (tmp_path / "model_final.pth").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "limit",
    [
        pytest.param(2000, marks=pytest.mark.soak),
        4000,
        pytest.param(100_000, marks=pytest.mark.soak),
    ],
)
def test_limited_file_sizes(limit: int, tmp_path: Path) -> None:
    """The real error of the operating system, from within ``torch.save``."""
    program = tmp_path / "limited.py"
    program.write_text(
        "import resource, sys\n"
        "from tests.helpers import toy_training\n"
        "from focalnet_det.errors import one_line_errors\n"
        "limit = int(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "sys.argv = ['toy', sys.argv[2]]\n"
        "with one_line_errors(): toy_training.main()"
    )
    folder = tmp_path / "run"
    failed = run_program(program, limit, folder)
    if limit < 10_000:
        assert failed.returncode == 1
        errors = [x for x in failed.stderr.splitlines() if x.startswith("error: ")]
        assert len(errors) == 1, failed.stderr
        assert "Traceback" not in failed.stderr
        assert "Could not write" in errors[0]
        assert "--resume" in errors[0]
    again = run_program(program, 2**30, folder)
    assert again.returncode == 0, again.stderr
    assert (folder / "model_ema.pth").exists()


def test_the_reason_is_the_systems_and_not_pytorchs(tmp_path: Path) -> None:
    """Whose writer reports "unexpected pos 704 vs 598" for a full disk."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")

    @contextlib.contextmanager
    def full(_: Path) -> Iterator[Path]:
        yield Path("/dev/full")

    with (
        mock.patch("focalnet_det.engine.checkpoints.replacing", full),
        pytest.raises(OSError, match=r"Could not write .*a\.pth: \[Errno 28\] No space left"),
    ):
        write_checkpoint(tmp_path / "a.pth", {"model": torch.zeros(100_000)})
