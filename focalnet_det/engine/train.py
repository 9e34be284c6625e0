"""The training loop, the same for both kinds of config."""

import contextlib
import json
import logging
import math
import time
from pathlib import Path
from typing import Any, cast

import torch
from detectron2.engine import SimpleTrainer, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter
from torch import Tensor, nn

from ..checkpoint import load_initial_weights
from ..checkpoint.growth import saved_growth, set_growth
from ..compat import create_ddp_model
from ..data.build import TrainLoader
from ..data.mappers import DATA_ISSUES
from ..data.tally import DataTally
from .checkpoints import (
    AtomicCheckpointer,
    CheckpointHook,
    random_states,
    restore_random_states,
    write_atomically,
)
from .ema import averaged_model
from .evaluate import evaluate, write_reports
from .experiment import Experiment, TrainOptions
from .hooks import GrowthHook, ProfilerHook, ProgressLine, WandbWriter
from .pictures import save_predictions, save_training_curves

logger = logging.getLogger("focalnet_det")

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer(SimpleTrainer):
    """Detectron2's trainer with autocast on any device, accumulation, clipping, averaged weights.

    Args:
        model, data_loader, optimizer: as in SimpleTrainer.
        options: ``device``, ``precision``, ``accumulation``, ``clip_*`` and ``ema_decay`` are read.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: TrainLoader,
        optimizer: torch.optim.Optimizer,
        options: TrainOptions,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.options = options
        device = options.device.split(":")[0]
        self.scaler = torch.amp.GradScaler(device, enabled=options.precision == "fp16")
        # With DistributedDataParallel the parameters are those of the module inside.
        self.inner = getattr(model, "module", model)
        self.start_average()
        self.tally = DataTally()

    def start_average(self) -> None:
        """Begins the moving average, if asked for, with the weights that the model has now."""
        decay = self.options.ema_decay
        self.ema = averaged_model(self.inner, decay) if decay else None

    @property
    def evaluated_model(self) -> nn.Module:
        """The averaged weights where there are some, or else the model, without its DDP wrapper."""
        return self.inner if self.ema is None else self.ema.module

    def run_step(self) -> None:
        """One iteration: data, forward, backward, update, metrics."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        for example in data:
            self.tally.add(example.pop(DATA_ISSUES, {}))
        send_images(data, self.options.device)
        self.optimizer.zero_grad(set_to_none=True)
        losses = at_once(self.accumulate_gradients(data))
        self._write_metrics(losses, data_time)
        with torch.profiler.record_function("optimizer"):
            self.clip_gradients()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.inner)

    def accumulate_gradients(self, data: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Gradients of the mean over the parts of a batch; returns the losses' means.

        Raises: ValueError if the batch cannot be split evenly.
        """
        parts = self.options.accumulation
        size, rest = divmod(len(data), parts)
        if rest:
            raise ValueError(
                f"A batch of {len(data)} images per process cannot be accumulated in {parts} parts."
            )
        means: dict[str, Tensor] = {}
        for part in range(parts):
            # Processes exchange gradients once an iteration.
            last = part == parts - 1
            with contextlib.nullcontext() if last else self.without_exchange():
                with autocast(self.options):
                    losses = self.model(data[part * size : (part + 1) * size])
                    total = sum(losses.values()) / parts
                self.scaler.scale(total).backward()
            for name, loss in losses.items():
                means[name] = means.get(name, 0) + loss.detach() / parts
        return means

    def without_exchange(self) -> contextlib.AbstractContextManager[Any]:
        """DistributedDataParallel's ``no_sync``, or nothing."""
        no_sync = getattr(self.model, "no_sync", contextlib.nullcontext)
        return cast(contextlib.AbstractContextManager[Any], no_sync())

    def total_tally(self) -> DataTally:
        """Of all processes, in the first one. To be called in all processes."""
        total = DataTally()
        for tally in comm.gather(self.tally):
            total.merge(tally)
        return total

    def clip_gradients(self) -> None:
        """Clips by value and by norm, as the options say, and records the norm."""
        if not self.options.clip_norm and not self.options.clip_value:
            return
        self.scaler.unscale_(self.optimizer)
        if self.options.clip_value:
            nn.utils.clip_grad_value_(self.model.parameters(), self.options.clip_value)
        if self.options.clip_norm:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
            self.storage.put_scalar("grad_norm", norm.item(), smoothing_hint=False)

    def state_dict(self) -> dict[str, Any]:
        """All that decides how the training goes on. To be called in all processes."""
        state = TrainerBase.state_dict(self)
        state["optimizer"] = self.optimizer.state_dict()
        state["scaler"] = self.scaler.state_dict()
        state["data_seed"] = self.data_loader.seed
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        state["tally"] = self.total_tally().state_dict()
        state["random"] = comm.gather(random_states(self.options.device))
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse, which also reads the states that Detectron2's own trainers save.

        What a file does not hold stays as it is, and is named in a warning.
        """
        # DefaultTrainer keeps the state of its inner trainer under a name of its own.
        state = {**state, **state.get("_trainer", {})}
        TrainerBase.load_state_dict(self, state)
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            logger.warning("The checkpoint holds no optimizer state: its moments start from zero.")
        scaler = state.get("scaler") or state.get("grad_scaler")
        if scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)
        self.data_loader.seed = state.get("data_seed", self.data_loader.seed)
        self.data_loader.start = self.iter + 1
        if self.ema is not None and "ema" in state:
            set_growth(self.ema, saved_growth(state["ema"]))
            self.ema.load_state_dict(state["ema"])
        elif self.ema is not None:
            logger.warning("The checkpoint holds no averaged weights: they start from its weights.")
            self.start_average()
        if "tally" in state and comm.is_main_process():
            self.tally.load_state_dict(state["tally"])
        states = state.get("random", [])
        if len(states) == comm.get_world_size():
            restore_random_states(states[comm.get_rank()], self.options.device)
        else:
            logger.warning(
                "The checkpoint holds the random states of %d processes, this run has %d: they "
                "start anew, so the losses will not be those of an uninterrupted run.",
                len(states),
                comm.get_world_size(),
            )


def send_images(data: list[dict[str, Any]], device: str) -> None:
    """Starts the copies of images to a GPU, in place, without waiting for them."""
    if device.split(":")[0] == "cuda":
        for example in data:
            example["image"] = example["image"].to(device, non_blocking=True)


def at_once(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """The losses in the CPU's memory, by one copy: every copy of its own waits for the device."""
    if not losses:
        return losses
    return dict(zip(losses, torch.stack(list(losses.values())).cpu(), strict=True))


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
    loader.seed = options.seed if options.seed >= 0 else comm.shared_random_seed()
    model = experiment.model().to(options.device)
    optimizer = experiment.optimizer(model)
    max_iter = experiment.schedule.max_iter(loader.iterations_per_epoch)
    describe(model, loader.num_images, loader.batch_size, max_iter, options)
    trainer = Trainer(create_ddp_model(model, **options.ddp), loader, optimizer, options)
    checkpointer = AtomicCheckpointer(
        model, options.output_dir, save_to_disk=comm.is_main_process(), trainer=trainer
    )
    save_period = options.to_iterations(options.checkpoint_period, loader.iterations_per_epoch)
    saving = CheckpointHook(
        checkpointer,
        period=save_period or max_iter,
        keep=options.keep_checkpoints,
        best_metric=options.keep_best,
    )
    results: dict[str, Any] = {}

    def evaluate_now() -> dict[str, Any]:
        results.clear()
        with autocast(options):
            results.update(evaluate(experiment, trainer.evaluated_model))
        first: dict[str, Any] = next(iter(results.values()), {})
        saving.after_evaluation(trainer.evaluated_model, first)
        # For the writers; a class that does not occur has no AP, and JSON no NaN.
        return {
            name: {
                task: {m: v for m, v in metrics.items() if math.isfinite(v)}
                for task, metrics in tasks.items()
            }
            for name, tasks in results.items()
        }

    multiplier = experiment.schedule.multiplier(loader.iterations_per_epoch)
    eval_period = options.to_iterations(options.eval_period, loader.iterations_per_epoch)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=LRMultiplier(optimizer, multiplier, max_iter)),
            ProfilerHook(Path(options.output_dir), *options.profile) if options.profile else None,
            # Before the checkpoint, which is to hold how far it is.
            GrowthHook(options.growth_iterations),
            saving,
            hooks.EvalHook(eval_period, evaluate_now),
        ]
    )
    start = 0
    if resume and checkpointer.has_checkpoint():
        checkpointer.load(checkpointer.get_checkpoint_file())
        start = trainer.iter + 1
        logger.info("Resuming at iteration %d.", start)
    elif options.init_checkpoint:
        levels = options.init_levels or None
        logger.info("%s", load_initial_weights(model, options.init_checkpoint, levels=levels))
        # Growth changes which buffers there are.
        trainer.start_average()
    if start >= max_iter:
        logger.info("Nothing left to train: %d of %d iterations are done.", start, max_iter)
        evaluate_now()
        return results
    if comm.is_main_process():
        writers = build_writers(experiment, max_iter, loader.batch_size, start)
        trainer.register_hooks([hooks.PeriodicWriter(writers, period=options.log_iterations)])
    if start == 0 and comm.is_main_process():
        trainer.tally.add(loader.file_issues)
    trainer.train(start, max_iter)
    logger.info("%s", trainer.total_tally().table())
    if comm.is_main_process():
        save_training_curves(experiment)
        save_predictions(experiment, trainer.evaluated_model)
        write_reports(experiment, results, f"weights after {max_iter:,} iterations")
    if trainer.ema is not None and comm.is_main_process():
        path = Path(options.output_dir) / "model_ema.pth"
        write_atomically(path, {"model": trainer.ema.module.state_dict()})
        logger.info("Averaged weights: %s", path)
    return results


def build_writers(
    experiment: Experiment, max_iter: int, batch_size: int, start: int
) -> list[EventWriter]:
    """Progress line, JSON lines, TensorBoard and, if asked, Weights & Biases.

    What an interrupted run wrote after its last checkpoint is taken out of the JSON lines.
    """
    options = experiment.options
    lines = Path(options.output_dir) / "metrics.json"
    if lines.exists():
        drop_lines_from(lines, start)
    writers: list[EventWriter] = [
        ProgressLine(max_iter, batch_size),
        # Values as they are: a median over the past would begin anew after a resumption.
        JSONWriter(str(lines), window_size=1),
        TensorboardXWriter(options.output_dir, purge_step=start),
    ]
    if options.wandb_project:
        writers.append(
            WandbWriter(options.wandb_project, options.output_dir, experiment.config_text)
        )
    return writers


def drop_lines_from(path: Path, iteration: int) -> None:
    """Takes the lines of this iteration and later ones out of a file of JSON lines."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["iteration"] < iteration:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # a line that was cut off
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


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
    if options.recipe_batch not in (0, batch_size):
        logger.warning(
            "The recipe's batch is %d, this run's %d: by the linear rule the learning rate would "
            "be multiplied by %g. It is not, unless you do so.",
            options.recipe_batch,
            batch_size,
            batch_size / options.recipe_batch,
        )
