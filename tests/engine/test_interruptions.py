"""Whatever cuts a run off, wherever: its end is that of a run that nothing cut off."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")
from focalnet_det.engine import iteration as iteration_module
from focalnet_det.engine import train as train_module
from focalnet_det.engine.checkpoints import Checkpoints
from focalnet_det.engine.finish import Product, finish
from focalnet_det.engine.run_folder import RunFolder
from focalnet_det.engine.signals import RunStopped, StopSignals
from tests.helpers import toy_training as toy
from tests.helpers.processes import Program
from tests.helpers.toy_runs import (
    OPTIONS,
    assert_same_end,
    best,
    lines,
    save_pictures_without_drawing,
)

KILLS = int(os.environ.get("SOAK_KILLS", "2"))


class Killed(BaseException):
    """Nothing in the engine may catch it, as nothing catches SIGKILL."""


# Functions whose call number n is cut off, before or after it did its work.
PLACES: dict[str, tuple[Any, str]] = {
    "save": (Checkpoints, "save"),
    "save_best": (Checkpoints, "save_best"),
    "metrics": (iteration_module.EndOfIteration, "write"),
    "evaluation": (train_module.Training, "_evaluate"),
    "results": (train_module, "write_results"),
    "products": (train_module.Training, "_products"),
    "averaged weights": (train_module, "write_checkpoint"),
    "curves": (train_module, "save_training_curves"),
    "noting a product": (RunFolder, "note_product"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    toy.run(folder, **OPTIONS)
    return folder


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_cut_off_at_every_step(
    place: str, after: bool, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run is cut off at call 1, its continuation at call 2, the next at 3, and so on."""
    save_pictures_without_drawing(monkeypatch)
    owner, name = PLACES[place]
    original = getattr(owner, name)
    calls, limit = 0, 1

    def cut(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == limit and not after:
            raise Killed
        result = original(*args, **kwargs)
        if calls == limit:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, cut)
    cuts = 0
    while True:
        calls = 0
        try:
            toy.run(tmp_path, **OPTIONS, resume=True)
            break
        except Killed:
            cuts += 1
            # What is cut off at its first step makes no progress.
            limit += 1
        assert cuts < 60
    assert cuts
    assert_same_end(tmp_path, whole)


def test_the_best_is_never_lost(tmp_path: Path) -> None:
    """Scores 50, then 40; killed at iteration 6 of a period of 4, and resumed."""
    options = {"eval_period": 4, "checkpoint_period": 4, "keep_best": "segm/AP", "iterations": 8}
    scores = [0, 0, 0, 50, 0, 0, 0, 40]

    def read(seed: int, iteration: int) -> list[dict[str, Any]]:
        if iteration == 6:
            raise Killed
        return toy.batch(seed, iteration)

    with pytest.raises(Killed):
        toy.run(tmp_path, read=read, scores=scores, **options)
    toy.run(tmp_path, scores=scores, resume=True, **options)
    assert (best(tmp_path)["score"], best(tmp_path)["iteration"]) == (50, 3)


def test_an_evaluation_is_not_repeated_in_vain(tmp_path: Path, whole: Path) -> None:
    """Killed after iteration 7 of 8, when that of iteration 6 was on disk."""
    seen: list[int] = []

    def read(seed: int, iteration: int) -> list[dict[str, Any]]:
        if iteration == 6 and not seen[2:]:
            raise Killed
        return toy.batch(seed, iteration)

    with pytest.raises(Killed):
        toy.run(tmp_path, read=read, evaluations=seen, **OPTIONS)
    assert seen == [6, 12]
    toy.run(tmp_path, evaluations=seen, resume=True, **OPTIONS)
    assert seen == [6, 12, 16]
    assert_same_end(tmp_path, whole)
    toy.run(tmp_path, evaluations=seen, resume=True, **OPTIONS)
    assert seen == [6, 12, 16]


def test_a_finished_run_makes_what_is_missing(whole: Path, tmp_path: Path) -> None:
    toy.run(tmp_path, **OPTIONS)
    for name in ("model_ema.pth", "curves.png"):
        (tmp_path / name).unlink()
    results = toy.run(tmp_path, **OPTIONS, resume=True)
    assert results[toy.DATA]["segm"]["AP"] == 45
    assert_same_end(tmp_path, whole)


def test_an_optional_product_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: Any) -> bool:
        raise KeyError("image")

    with monkeypatch.context() as patched:
        patched.setattr(train_module, "save_training_curves", fails)
        toy.run(tmp_path, **OPTIONS)
    assert "curves.png (KeyError: 'image')" in caplog.text
    assert (tmp_path / "model_ema.pth").exists()
    toy.run(tmp_path, **OPTIONS, resume=True)
    assert (tmp_path / "curves.png").exists()


def test_required_products_come_first_and_fail_last(tmp_path: Path) -> None:
    made: list[str] = []

    def product(name: str, required: bool) -> Product:
        def make() -> bool:
            made.append(name)
            if name.startswith("bad"):
                raise OSError(f"no room for {name}")
            (tmp_path / name).write_text("")
            return True

        return Product(name=name, make=make, required=required)

    products = [product("a", False), product("bad", True), product("b", True)]
    with RunFolder.open(tmp_path) as folder:
        with pytest.raises(OSError, match="no room for bad"):
            finish(folder, 7, products)
        assert made == ["bad", "b", "a"]
        finish(folder, 7, [products[0], products[2]])
        assert made == ["bad", "b", "a"]
        finish(folder, 8, [products[0]])
        assert made[3:] == ["a"]


# Signals.


def start(folder: Path, *options: str) -> Program:
    return Program(toy.__file__, folder, *options, merged=True)


def wait_for_line(folder: Path, process: Program, count: int = 1) -> None:
    path = folder / "metrics.json"
    while process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_a_signal_saves_and_a_second_one_leaves(number: int, code: int, tmp_path: Path) -> None:
    process = start(tmp_path, "--iterations=1000", "--seconds=0.2")
    wait_for_line(tmp_path, process, 2)
    # Not where checkpoints are due: the signal alone writes this one.
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    name = signal.Signals(number).name
    assert f"{name}: stopping as soon as the state is saved" in output
    assert f"Stopped by {name} after iteration" in output
    done = len(lines(tmp_path))
    newest = (tmp_path / "last_checkpoint").read_text()
    saved = torch.load(tmp_path / newest, weights_only=True)
    # The metrics of an iteration are owed where its evaluation is.
    assert saved["iteration"] == done - (saved["pending"] is None)

    before = (tmp_path / "run.lock").stat().st_mtime_ns
    again = start(tmp_path, "--iterations=1000", "--seconds=30")
    wait_for_line(tmp_path, again, done)
    # Its folder is open before its handlers are in place.
    while again.poll() is None and not (tmp_path / "run.lock").stat().st_mtime_ns > before:
        time.sleep(0.05)
    time.sleep(1)
    deadline = time.monotonic() + 60
    while again.poll() is None and time.monotonic() < deadline:
        again.send_signal(number)
        time.sleep(0.5)
    assert again.returncode in (-number, code)


def test_a_signal_during_evaluation_stops_it(tmp_path: Path) -> None:
    """The checkpoint before the evaluation says that it is owed."""
    stopped: list[str] = []

    def evaluate(*_: Any, between: Callable[[], None]) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        between()
        stopped.append("went on")
        return {}

    options = OPTIONS | {"scores": []}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(toy.mock, "patch", FakePatch(evaluate))
        with pytest.raises(SystemExit) as stop:
            toy.run(tmp_path, **options)
    assert stop.value.code == 75
    assert not stopped
    newest = (tmp_path / "last_checkpoint").read_text()
    assert torch.load(tmp_path / newest, weights_only=True)["pending"]["total_loss"] < 0
    toy.run(tmp_path, **options, resume=True)
    assert [("toy/segm/AP" in line) for line in lines(tmp_path)] == [
        done in (3, 6, 8) for done in range(1, 9)
    ]


class FakePatch:
    """Replaces the toy's own evaluation."""

    def __init__(self, evaluate: Callable[..., Any]) -> None:
        self.evaluate = evaluate

    def object(self, owner: Any, name: str, _: Any) -> Any:
        return patcher(owner, name, self.evaluate)


patcher = toy.mock.patch.object


def test_stop_signals_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals(quiet=True) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert RunStopped(signal.SIGTERM, 3).exit_code == 75


@pytest.mark.slow
def test_random_kills(tmp_path: Path) -> None:
    """SIGKILL at random moments, saves, evaluations and the end included."""
    options = ["--iterations=24", "--seconds=0.02"]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    output, _ = start(whole, *options).communicate()
    assert (whole / "curves.png").exists(), output
    chance = random.Random()
    kills = runs = 0
    while kills < KILLS:
        # A run is killed until it comes to its end before the next kill; then there is another.
        process = start(torn, *options)
        opened = (torn / "run.lock").stat().st_mtime_ns if (torn / "run.lock").exists() else 0
        while process.poll() is None:
            if (torn / "run.lock").exists() and (torn / "run.lock").stat().st_mtime_ns != opened:
                break
            time.sleep(0.005)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=chance.random() * 1.2)
        if process.poll() is None and kills < KILLS:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
        if process.returncode == 0 or kills == KILLS:
            if process.returncode != 0:
                process = start(torn, *options)
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output
            assert_same_end(torn, whole)
            shutil.rmtree(torn)
            runs += 1
    print(f"{kills} kills in {runs} runs")


@pytest.mark.parametrize("is_spawned", [False, True])
def test_a_signal_is_announced_by_the_process_that_people_started(
    is_spawned: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A job that ends because one process failed sends SIGTERM to others, who save nothing."""

    def read(seed: int, iteration: int) -> list[dict[str, Any]]:
        os.kill(os.getpid(), signal.SIGTERM)
        return toy.batch(seed, iteration)

    parent = mock.Mock() if is_spawned else None
    with (
        mock.patch("multiprocessing.parent_process", return_value=parent),
        pytest.raises(SystemExit),
    ):
        toy.run(tmp_path, read=read)
    assert ("SIGTERM: stopping" in capfd.readouterr().err) != is_spawned
