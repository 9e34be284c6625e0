"""A run's folder: what lies there is this run's, or moved aside; one writer at a time."""

import contextlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det import atomic
from focalnet_det.engine import run_folder
from focalnet_det.engine.checkpoints import newest_whole
from focalnet_det.engine.numerics import NumericalTrouble
from focalnet_det.engine.run_folder import EARLIER, RunFolder, in_first_process, sendable
from focalnet_det.engine.signals import RunStopped
from focalnet_det.errors import read_failure
from tests.helpers import toy_training as toy


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith("events.out")}


def test_a_new_run_in_a_used_folder_keeps_both(tmp_path: Path) -> None:
    """The numbers of the earlier run are higher: its checkpoints must not outlive those of this."""
    (tmp_path / "notes.txt").write_text("mine")
    toy.run(tmp_path, iterations=50, checkpoint_period=10)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path) - {"evaluation"}}
    first = json.loads((tmp_path / "run.json").read_text())["id"]

    class Killed(BaseException):
        pass

    def read(seed: int, iteration: int) -> list[dict]:
        if iteration == 9:
            raise Killed
        return toy.batch(seed, iteration)

    with pytest.raises(Killed):
        toy.run(tmp_path, iterations=12, checkpoint_period=2, read=read)
    aside = tmp_path / EARLIER / "001"
    kept = before.keys() - {"notes.txt", "run.lock"}
    assert {name: (aside / name).read_bytes() for name in kept} == {n: before[n] for n in kept}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert {n for n in names(tmp_path) if n.startswith("model_")} == {
        f"model_000000{i}.pth" for i in (3, 5, 7)
    }
    assert (tmp_path / (tmp_path / "last_checkpoint").read_text()).is_file()
    assert json.loads((tmp_path / "run.json").read_text())["id"] != first
    # Lines 0 to 8 are there; the last checkpoint is that of iteration 7.
    toy.run(tmp_path, iterations=12, checkpoint_period=2, resume=True)
    lines = [json.loads(x)["iteration"] for x in (tmp_path / "metrics.json").open()]
    assert lines == list(range(12))


def test_overwrite_deletes_the_earlier_run_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    toy.run(tmp_path, iterations=6)
    toy.run(tmp_path, iterations=2, overwrite=True)
    assert not (tmp_path / EARLIER).exists()
    assert "model_0000003.pth" not in names(tmp_path)
    assert {"notes.txt", "model_final.pth"} <= names(tmp_path)


def test_a_run_that_died_at_once_is_not_kept(tmp_path: Path) -> None:
    def fails(*_: object) -> None:
        raise ValueError("no such data")

    for _ in range(2):
        with pytest.raises(ValueError, match="no such data"):
            toy.run(tmp_path, read=fails)
    assert not (tmp_path / EARLIER).exists()


def test_evaluation_leaves_a_run_alone(tmp_path: Path) -> None:
    toy.run(tmp_path, iterations=2)
    before = names(tmp_path)
    with RunFolder.open(tmp_path, evaluate=True):
        pass
    assert names(tmp_path) == before
    with RunFolder.open(tmp_path / "new", evaluate=True):
        pass
    assert names(tmp_path / "new") == {"run.lock"}


def test_two_runs_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys; from focalnet_det.engine.run_folder import RunFolder\n"
        "with RunFolder.open(sys.argv[1]): print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        record = (tmp_path / "run.json").read_text()
        monkeypatch.setattr(run_folder, "LOCK_TIMEOUT", 0.3)
        for options in ({}, {"resume": True}, {"evaluate": True}, {"overwrite": True}):
            with pytest.raises(BlockingIOError, match=rf"process {process.pid} on .*--output"):
                RunFolder.open(tmp_path, **options)
        assert (tmp_path / "run.json").read_text() == record
        process.communicate("")
    # It ends with its holder; the content of the file is of no matter.
    with RunFolder.open(tmp_path, resume=True):
        assert f"process {os.getpid()}" in (tmp_path / "run.lock").read_text()


def test_a_child_process_does_not_hold_the_lock(tmp_path: Path) -> None:
    """As a loader worker that outlives its killed run for a moment."""
    program = (
        "import os, sys, time; from focalnet_det.engine.run_folder import RunFolder\n"
        "RunFolder.open(sys.argv[1])\n"
        "if os.fork() == 0: time.sleep(60)\n"
        "print('open', flush=True); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        process.wait()
        with RunFolder.open(tmp_path, resume=True):
            pass
    finally:
        os.killpg(process.pid, 9)


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_folder.fcntl, "lockf", refuse)
    with RunFolder.open(tmp_path):
        assert "not support locks (Operation not supported)" in caplog.text


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f".model_final.pth.{gone.pid}-0.tmp").write_text("half")
    (tmp_path / f".model_final.pth.{os.getppid()}-0.tmp").write_text("being written")
    (tmp_path / ".own.tmp").write_text("of somebody else")
    with RunFolder.open(tmp_path):
        hidden = {name for name in names(tmp_path) if name.startswith(".")}
    assert hidden == {f".model_final.pth.{os.getppid()}-0.tmp", ".own.tmp"}


def test_files_are_replaced_or_left(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "file.txt"
    atomic.write_text(path, "first")
    with pytest.raises(ZeroDivisionError), atomic.replacing(path) as temporary:
        raise ZeroDivisionError(temporary.write_text("second"))
    assert path.read_text() == "first"
    assert names(path.parent) == {"file.txt"}
    atomic.write_text(path, ["a", "b"], durable=False)
    assert path.read_text() == "ab"


def test_errors_of_the_first_process_are_those_of_all() -> None:
    assert in_first_process(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        in_first_process(lambda: 1 / 0)


def test_an_unreadable_record_is_a_new_run(tmp_path: Path) -> None:
    toy.run(tmp_path, iterations=2)
    (tmp_path / "run.json").write_text("{")
    assert newest_whole(tmp_path) == tmp_path / "model_final.pth"
    with RunFolder.open(tmp_path, resume=True) as folder:
        assert len(folder.record.id) == 32


def test_checkpoints_say_whose_they_are(tmp_path: Path) -> None:
    toy.run(tmp_path, iterations=2, config="model: {width: 2}")
    content = torch.load(tmp_path / "model_final.pth", weights_only=True)
    record = json.loads((tmp_path / "run.json").read_text())
    assert content["run"]["id"] == record["id"]
    assert content["run"]["config"] == "model: {width: 2}"
    assert content["run"]["data"] == "toy data"


def test_a_lost_record_does_not_lose_the_best_model(tmp_path: Path) -> None:
    """The checkpoint knows which run it is of: 40 does not take the place of 50."""
    options = {"keep_best": "segm/AP", "eval_period": 2, "iterations": 4}
    toy.run(tmp_path, scores=[0, 50, 0, 40], **options)
    run_id = json.loads((tmp_path / "run.json").read_text())["id"]
    (tmp_path / "run.json").write_text("{")
    toy.run(tmp_path, scores=[0, 50, 0, 40, 0, 45], resume=True, **(options | {"iterations": 6}))
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["score"] == 50
    assert json.loads((tmp_path / "run.json").read_text())["id"] == run_id


def test_resuming_without_checkpoints_spoils_nothing(tmp_path: Path) -> None:
    toy.run(tmp_path, scores=[50, 50], keep_best="segm/AP", iterations=2)
    (tmp_path / "model_final.pth").unlink()
    metrics = (tmp_path / "metrics.json").read_text()
    toy.run(tmp_path, scores=[10, 10], keep_best="segm/AP", iterations=2, resume=True)
    aside = tmp_path / EARLIER / "001"
    assert torch.load(aside / "model_best.pth", weights_only=True)["score"] == 50
    assert (aside / "metrics.json").read_text() == metrics


def test_the_recorded_seed_is_that_of_the_order_of_images(tmp_path: Path) -> None:
    """Also if the first start, with a random one, was killed before its first checkpoint."""

    class Killed(BaseException):
        pass

    seeds = []

    def read(seed: int, iteration: int) -> list[dict]:
        seeds.append(seed)
        if len(seeds) == 1:
            raise Killed
        return toy.batch(seed % 100, iteration)

    with pytest.raises(Killed):
        toy.run(tmp_path, seed=-1, iterations=2, read=read)
    toy.run(tmp_path, seed=-1, iterations=2, read=read, resume=True)
    record = json.loads((tmp_path / "run.json").read_text())
    assert set(seeds) == {record["data_seed"]}


def test_links_of_an_earlier_run_are_moved_or_deleted(tmp_path: Path) -> None:
    """And never what they point at."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "scores.json").write_text("{}")
    for overwrite in (False, True):
        folder = tmp_path / f"run{overwrite:d}"
        folder.mkdir()
        (folder / "model_final.pth").symlink_to(tmp_path / "nowhere")
        (folder / "evaluation").symlink_to(elsewhere)
        RunFolder.open(folder, overwrite=overwrite).__exit__(None, None, None)
        assert names(folder) == {"run.json", "run.lock", *([] if overwrite else [EARLIER])}
        assert (elsewhere / "scores.json").is_file()


@pytest.mark.parametrize("path", ["file", "file/below", "locked"])
def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "locked" / "run.lock").mkdir(parents=True)
    with pytest.raises(OSError, match=f"{path} cannot be used as the output folder.*--output"):
        RunFolder.open(tmp_path / path)


def test_errors_are_sent_with_where_they_come_from() -> None:
    """So that a defect in the first process reads as one in all."""

    class Particular(Exception):
        def __init__(self, number: int, text: str) -> None:
            super().__init__(f"{number}: {text}")

    assert str(sendable(Particular(3, "no"))) == "3: no"
    for error in (RunStopped(15, 3), NumericalTrouble("no", 3)):
        copy = pickle.loads(pickle.dumps(sendable(error)))
        assert (type(copy), str(copy)) == (type(error), str(error))
    with pytest.raises(KeyError) as caught:
        _in_second_process(KeyError("image"))
    failure = read_failure(caught.value)
    assert not failure.is_expected
    assert "in fail" in failure.trace


def _in_second_process(error: Exception) -> None:
    """Call `in_first_process` as the second of two processes, in the first of which this fails."""

    def fail() -> None:
        {}[error.args[0]]

    sent = []

    def gather(outcome: object) -> list[object]:
        sent.append(outcome)
        return sent

    with mock.patch.object(run_folder.comm, "all_gather", gather):
        with contextlib.suppress(KeyError):
            in_first_process(fail)
        with mock.patch.object(run_folder.comm, "is_main_process", return_value=False):
            in_first_process(fail)
