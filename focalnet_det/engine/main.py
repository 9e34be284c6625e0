"""Train or evaluate from command-line arguments; the library side of tools/train_net.py."""

import logging
from pathlib import Path
from typing import Any

from detectron2.utils import comm

from ..checkpoint import load_initial_weights
from ..experiment import Experiment, RunArguments, check, describe, register_all
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
    experiment = check(describe(args), eval_only=args.eval_only)
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


def run_evaluation(experiment: Experiment) -> dict[str, Any]:
    """Evaluate ``init_checkpoint``.

    Raises: ValueError if there is none or it does not match the model.
    """
    options = experiment.options
    if not options.init_checkpoint:
        raise ValueError(
            "--eval-only requires weights. Add train.init_checkpoint=FILE (.py config) or "
            "MODEL.WEIGHTS FILE (.yaml config)."
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
