"""The command ``focalnet-det``: every tool of the package by a short name, in any folder."""

import importlib
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass

from . import __version__
from .errors import one_line_errors
from .resources import resource_folder

PROGRAM = "focalnet-det"


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        summary: what it does, for the list of commands.
        script: file that is run, folder first, such as ``tools/train_net.py``.
        module: module whose ``main(argv)`` is called instead.
        arguments: that come before those of the user.
    """

    summary: str
    script: str = ""
    module: str = ""
    arguments: tuple[str, ...] = ()


COMMANDS = {
    "train": Command("train a detector or segmentor", "tools/train_net.py"),
    "evaluate": Command(
        "evaluate a run or a checkpoint", "tools/train_net.py", arguments=("--eval-only",)
    ),
    "predict": Command("predict images, folders and videos", "tools/predict.py"),
    "serve": Command(
        "try a trained model in the browser, on this machine", module="focalnet_det.predict.serve"
    ),
    "visualize-modulation": Command(
        "show what the gates and modulators of a model do", "tools/visualize_modulation.py"
    ),
    "visualize-data": Command("draw augmented training samples", "tools/visualize_data.py"),
    "export": Command("write a trained model as ONNX or torch.export", "tools/export_model.py"),
    "configs": Command("list the configs of the package", "tools/list_configs.py"),
    "verify": Command("examine a dataset before training", "tools/verify_dataset.py"),
    "inspect": Command("tell what is in a checkpoint", "tools/inspect_checkpoint.py"),
    "convert": Command("convert a checkpoint between libraries", "tools/convert_checkpoint.py"),
    "analyze": Command("count parameters, FLOPs and memory", "tools/analyze_model.py"),
    "benchmark": Command("measure speed beside other libraries", "tools/benchmark.py"),
    "replay": Command("repeat an iteration that was not finite", "tools/replay_step.py"),
    "demo": Command("train a small model on generated data", "tools/run_demo.py"),
    "make-shapes": Command("generate the data of the demo", "datasets/make_shapes.py"),
    "prepare-coco-panoptic": Command(
        "make semantic labels of COCO panoptic", "datasets/prepare_coco_panoptic.py"
    ),
    "prepare-ade20k-semantic": Command(
        "make ADE20K's semantic labels", "datasets/prepare_ade20k_sem_seg.py"
    ),
    "prepare-ade20k-instance": Command(
        "make ADE20K's instances", "datasets/prepare_ade20k_ins_seg.py"
    ),
    "prepare-ade20k-panoptic": Command(
        "make ADE20K's panoptic segments", "datasets/prepare_ade20k_pan_seg.py"
    ),
    "prepare-class-folders": Command(
        "cut objects out into folders of classes", "datasets/prepare_class_folders.py"
    ),
    "install-detectron2": Command(
        "install Detectron2 without a compiler", "tools/install_detectron2.py"
    ),
}


def usage() -> str:
    """Return the list of commands."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [ARGUMENTS]",
            "",
            "Detection and segmentation with focal networks.",
            "",
            *rows,
            "",
            f"{PROGRAM} COMMAND --help shows the arguments of a command.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand, as ``focalnet-det`` and ``python -m focalnet_det`` do.

    Args:
        argv: command and its arguments; None for those of the process.
    Raises: SystemExit with the status of the command.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    if arguments[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        return
    with one_line_errors():
        name, *rest = arguments
        if name not in COMMANDS:
            raise ValueError(f"Unknown command {name!r}. Known: {', '.join(COMMANDS)}.")
        run(name, [*COMMANDS[name].arguments, *rest])


def run(name: str, arguments: Sequence[str]) -> None:
    """Run a subcommand in this process.

    Args:
        name: one of ``COMMANDS``.
        arguments: of its script or module.
    """
    command = COMMANDS[name]
    if command.module:
        importlib.import_module(command.module).main(list(arguments))
        return
    folder, file = command.script.split("/")
    path = resource_folder(folder) / file
    # As Python does for a script that it is called with; some import their neighbors.
    sys.path.insert(0, str(path.parent))
    # Not runpy, which would call the program by its path.
    sys.argv = [f"{PROGRAM} {name}", *arguments]
    script = types.ModuleType("__main__")
    script.__file__ = str(path)
    before, sys.modules["__main__"] = sys.modules["__main__"], script
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), script.__dict__)
    finally:
        sys.modules["__main__"] = before
