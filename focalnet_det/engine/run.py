"""Start of a run: folders, logs, seeds, the record of what was run."""

import logging
import subprocess
import sys
from pathlib import Path

import torch
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from ..errors import quiet_libraries
from ..experiment import Experiment


def start_run(experiment: Experiment) -> Path:
    """Prepares the output folder and the logs of this process, and seeds it.

    The folder gets ``config.yaml`` (the full config), ``environment.txt`` (command, git state,
    versions) and ``log.txt``.

    Returns: the output folder.
    Raises: OSError if the folder cannot be written.
    """
    quiet_libraries()
    options = experiment.options
    folder = Path(options.output_dir)
    if comm.is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(experiment.config_text)
        command = " ".join(sys.argv)
        text = f"{command}\n\n{git_state()}\n{collect_env_info()}\n"
        (folder / "environment.txt").write_text(text)
    comm.synchronize()
    for name in ("fvcore", "detectron2", "focalnet_det"):
        setup_logger(str(folder), distributed_rank=comm.get_rank(), name=name, abbrev_name=name)
    # What Detectron2 says while it works is in log.txt; the screen is for the run itself.
    for name in ("fvcore", "detectron2"):
        for handler in logging.getLogger(name).handlers:
            if getattr(handler, "stream", None) is sys.stdout:
                handler.setLevel(logging.CRITICAL)
    seed_all_rng(None if options.seed < 0 else options.seed + comm.get_rank())
    torch.backends.cudnn.benchmark = False
    return folder


def git_state(folder: Path = Path(__file__).parent) -> str:
    """Commit and changed files of the checkout that a folder is in, or that there is none."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout.rstrip()

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--short")
    except (OSError, subprocess.CalledProcessError):
        return "git: not a checkout, or git is not installed."
    return f"git: {commit}" + (f", with changes:\n{changes}" if changes else ", unchanged.")
