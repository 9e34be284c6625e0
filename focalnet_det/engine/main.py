"""Train or evaluate from command-line arguments; the library side of tools/train_net.py."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from detectron2.utils import comm

from ..checkpoint import load_initial_weights
from ..experiment import Experiment, RunArguments, check, describe, register_all
from .checkpoints import best_checkpoint
from .evaluate import evaluate, write_reports
from .logs import hold_records
from .precision import autocast
from .random_state import make_deterministic
from .run import start_run
from .run_folder import RunFolder
from .run_pictures import save_predictions
from .train import train

__all__ = ["RunArguments", "register_all", "run", "run_evaluation"]

logger = logging.getLogger("focalnet_det")


def run(args: RunArguments) -> dict[str, Any]:
    """Train, or evaluate the initial weights, and return the results of the last evaluation."""
    hold_records()
    experiment = describe(args)
    if args.eval_only:
        experiment = with_saved_weights(experiment, args)
    experiment = check(experiment, eval_only=args.eval_only)
    options = experiment.options
    if options.deterministic:
        make_deterministic()
    with RunFolder.open(
        options.output_dir,
        resume=args.resume,
        evaluate=args.eval_only,
        overwrite=args.overwrite,
    ) as folder:
        start_run(experiment, evaluation_only=args.eval_only, resume=args.resume)
        if args.eval_only:
            return run_evaluation(experiment)
        return train(experiment, folder, resume=args.resume)


def with_saved_weights(experiment: Experiment, args: RunArguments) -> Experiment:
    """Return an evaluation of the weights that a run has saved in the output folder.

    The folder must be named, or be that of the config file. Weights that the command line names
    come first, and those that the training began with come last.
    """
    settings = experiment.settings
    folder = Path(settings.options.output_dir)
    is_named = bool(args.output) or Path(args.config_file).resolve().parent == folder.resolve()
    saved = best_checkpoint(folder) if is_named else None
    if saved is None or "init_checkpoint" in experiment.given:
        return experiment
    options = replace(settings.options, init_checkpoint=str(saved))
    return experiment.with_settings(replace(settings, options=options))


def run_evaluation(experiment: Experiment) -> dict[str, Any]:
    """Evaluate ``init_checkpoint``.

    Raises: ValueError if there is none or it does not match the model.
    """
    options = experiment.options
    if not options.init_checkpoint:
        raise ValueError(
            "--eval-only requires weights. Name the folder of a finished run (--output), or add "
            "train.init_checkpoint=FILE (.py config) or MODEL.WEIGHTS FILE (.yaml config)."
        )
    model = experiment.model()
    report = load_initial_weights(model, options.init_checkpoint, new_classes=False)
    logger.info("%s", report)
    model.to(options.device)
    with autocast(options):
        results = evaluate(experiment, model)
    if comm.is_main_process():
        save_predictions(experiment, model)
        write_reports(experiment, results, Path(options.init_checkpoint).name)
    return results
