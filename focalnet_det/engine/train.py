"""The training loop, the same for both kinds of config."""

import contextlib
import logging
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import SimpleTrainer, hooks
from detectron2.engine.defaults import create_ddp_model
from detectron2.engine.train_loop import TrainerBase
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import JSONWriter, TensorboardXWriter
from torch import nn

from ..checkpoint import load_initial_weights
from .evaluate import evaluate
from .experiment import Experiment, TrainOptions
from .hooks import AtomicCheckpointer, ProgressLine

logger = logging.getLogger("focalnet_det")

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer(SimpleTrainer):
    """Detectron2's trainer with autocast on any device, clipping, and all its state in the file.

    Args:
        model, data_loader, optimizer: as in SimpleTrainer.
        options: ``device``, ``precision`` and ``clip_norm`` are read.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        options: TrainOptions,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.options = options
        device = options.device.split(":")[0]
        self.scaler = torch.amp.GradScaler(device, enabled=options.precision == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the forward pass."""
        return autocast(self.options)

    def run_step(self) -> None:
        """One iteration: data, forward, backward, update, metrics."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with self.autocast():
            losses = self.model(data)
            total = sum(losses.values())
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        self._write_metrics(losses, data_time)
        if self.options.clip_norm > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Iteration, hooks, optimizer and scaler (v0.6 alone would forget the last two)."""
        state = TrainerBase.state_dict(self)
        state["optimizer"] = self.optimizer.state_dict()
        state["scaler"] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse; a file without optimizer or scaler leaves those as they are."""
        TrainerBase.load_state_dict(self, state)
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            logger.warning("The checkpoint holds no optimizer state: its moments start from zero.")
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])


def autocast(options: TrainOptions) -> contextlib.AbstractContextManager[Any]:
    """Autocast as the options say, or nothing for fp32."""
    if options.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(options.device.split(":")[0], AUTOCAST_DTYPES[options.precision])


def train(experiment: Experiment, *, resume: bool = False) -> dict[str, Any]:
    """Trains, with periodic checkpoints and evaluation.

    Args:
        experiment: what to train.
        resume: continue from the last checkpoint in the output folder, if there is one.
    Returns: results of the last evaluation, as :func:`evaluate` returns them.
    Raises: OSError if the disk is full, FloatingPointError if the loss is not finite.
    """
    options = experiment.options
    loader = experiment.train_loader()
    model = experiment.model().to(options.device)
    optimizer = experiment.optimizer(model)
    max_iter = experiment.schedule.max_iter(loader.iterations_per_epoch)
    describe(model, loader.num_images, loader.batch_size, max_iter, options)

    trainer = Trainer(create_ddp_model(model, **options.ddp), loader, optimizer, options)
    checkpointer = AtomicCheckpointer(
        model,
        options.output_dir,
        save_to_disk=comm.is_main_process(),
        trainer=trainer,
    )
    multiplier = experiment.schedule.multiplier(loader.iterations_per_epoch)
    results: dict[str, Any] = {}

    def evaluate_now() -> None:
        results.clear()
        with autocast(options):
            results.update(evaluate(experiment, trainer.model))

    eval_period = options.to_iterations(options.eval_period, loader.iterations_per_epoch)
    save_period = options.to_iterations(options.checkpoint_period, loader.iterations_per_epoch)
    writers = [
        ProgressLine(max_iter, loader.batch_size),
        JSONWriter(str(Path(options.output_dir) / "metrics.json")),
        TensorboardXWriter(options.output_dir),
    ]
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=LRMultiplier(optimizer, multiplier, max_iter)),
            hooks.PeriodicCheckpointer(
                checkpointer,
                save_period or max_iter,
                max_iter=max_iter,
                max_to_keep=options.keep_checkpoints,
            )
            if comm.is_main_process()
            else None,
            hooks.EvalHook(eval_period, evaluate_now),
            hooks.PeriodicWriter(writers, period=options.log_iterations)
            if comm.is_main_process()
            else None,
        ]
    )
    start = 0
    if resume and checkpointer.has_checkpoint():
        checkpointer.load(checkpointer.get_checkpoint_file())
        start = trainer.iter + 1
        logger.info("Resuming at iteration %d.", start)
    elif options.init_checkpoint:
        logger.info("%s", load_initial_weights(model, options.init_checkpoint))
    if start >= max_iter:
        logger.info("Nothing left to train: %d of %d iterations are done.", start, max_iter)
        evaluate_now()
        return results
    trainer.train(start, max_iter)
    return results


def describe(
    model: nn.Module, num_images: int, batch_size: int, max_iter: int, options: TrainOptions
) -> None:
    """Says in one line what is about to be trained."""
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(
        "Training %.1f M parameters on %d images, %d iterations of batch %d, %s on %s.",
        parameters / 1e6,
        num_images,
        max_iter,
        batch_size,
        options.precision,
        options.device,
    )
