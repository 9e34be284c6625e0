"""What is logged before the folder of a run is known reaches its screen and its file."""

import errno
import logging
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is missing: run make install")

from focalnet_det.engine.logs import RunLog, hold_records, start_logs

logger = logging.getLogger("focalnet_det.engine.own_data")


@pytest.mark.parametrize("rank", [0, 1])
def test_early_records_are_replayed(
    rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in ("a", "b"):  # twice in one process: each run has its own screen and file
        (tmp_path / run).mkdir()
        hold_records()
        logger.info("early in %s", run)
        start_logs(tmp_path / run, rank)
        logger.info("late in %s", run)
    hold_records()
    logger.info("of no run")
    output = capsys.readouterr().out
    name = "log.txt.rank1" if rank else "log.txt"
    for run in ("a", "b"):
        lines = (tmp_path / run / name).read_text().splitlines()
        assert [line.partition("INFO: ")[2] for line in lines] == [
            f"early in {run}",
            f"late in {run}",
        ]
        for when in ("early", "late"):
            assert output.count(f"{when} in {run}") == (rank == 0)
    assert "of no run" not in output


def test_a_full_disk_costs_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    handler = RunLog("/dev/full")
    log = logging.Logger("full")
    log.addHandler(handler)
    for number in range(3):
        log.error("line %d", number)
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"warning: cannot write /dev/full ([Errno {errno.ENOSPC}]")
    assert captured.out == ""
    with pytest.raises(OSError, match="No space"):
        handler.close()


def test_details_are_for_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Such as the traceback of an optional product that could not be made."""
    hold_records()
    start_logs(tmp_path, 0)
    logger.debug("a long traceback")
    logger.info("one line")
    hold_records()
    captured = capfd.readouterr()
    assert "one line" in captured.out
    assert "a long traceback" not in captured.out + captured.err
    assert "a long traceback" in (tmp_path / "log.txt").read_text()
