"""Set up a run: output folder, logs, seeds, and a record of config and environment."""

import datetime
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng

from ..atomic import write_text
from ..errors import silence_libraries
from ..experiment import Experiment
from .agreement import check_agreement, library_versions
from .logs import start_logs
from .run_folder import CONFIG


def start_run(
    experiment: Experiment, *, evaluation_only: bool = False, resume: bool = False
) -> Path:
    """Set up the output folder and the logs of this process, and seed it.

    `config.yaml` (the full config), `environment.txt` (a record of each start) and `log.txt` are
    written to the output folder. With ``evaluation_only``, the first two go to its subfolder
    `evaluation`, to preserve those of a training. The config of a resumed training is written only
    after its checkpoint was loaded.

    Args:
        experiment: provides config and options.
        evaluation_only: nothing will be trained.
        resume: the run resumes from a checkpoint.
    Returns: the output folder.
    Raises: OSError if the folder cannot be written, ValueError if the processes of this job
        disagree on config or versions.
    """
    silence_libraries()
    options = experiment.options
    folder = Path(options.output_dir)
    check_agreement(
        library_versions() | {"precision": options.precision, "the config": experiment.config_text}
    )
    # In every process, since machines may not share a disk.
    folder.mkdir(parents=True, exist_ok=True)
    if comm.is_main_process():
        record = folder / "evaluation" if evaluation_only else folder
        if not resume:
            write_text(record / CONFIG, experiment.config_text)
        append_start(record / "environment.txt", options.seed)
    comm.synchronize()
    start_logs(folder, comm.get_rank())
    seed_all_rng(None if options.seed < 0 else options.seed + comm.get_rank())
    torch.backends.cudnn.benchmark = False
    return folder


def append_start(path: Path, seed: int) -> None:
    """Append a record of this start: time, command, git state, seed and versions.

    Args:
        path: `environment.txt`.
        seed: of the run, negative for a random one.
    """
    earlier = path.read_text(encoding="utf-8", errors="replace") + "\n" if path.exists() else ""
    deterministic = "on" if torch.are_deterministic_algorithms_enabled() else "off"
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    write_text(
        path,
        [
            earlier,
            f"{shlex.join(sys.argv)}\n\nstarted: {now}\n",
            f"seed: {seed if seed >= 0 else 'random'}\ndeterministic algorithms: {deterministic}\n",
            f"{git_state()}\n{collect_env_info()}\n",
        ],
    )


def git_state(folder: Path = Path(__file__).parent) -> str:
    """Describe commit and modified files of the git checkout that contains a folder."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout.rstrip()

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--short")
    except (OSError, subprocess.CalledProcessError):
        return "git: not a checkout, or git is not installed."
    return f"git: {commit}" + (f", with changes:\n{changes}" if changes else ", unchanged.")
