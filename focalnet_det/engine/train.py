"""Run a training from its first iteration or its last checkpoint to its final outputs."""

import logging
import multiprocessing
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..atomic import write_text
from ..checkpoint import load_initial_weights
from ..compat import create_ddp_model
from ..experiment import Experiment, TrainOptions
from .agreement import check_agreement
from .checkpoints import AVERAGED, FINAL, Checkpoints, RunFacts, write_checkpoint
from .ema import averaged_model
from .evaluate import evaluate, evaluation_folder, write_reports
from .finish import Product, finish, read_results, write_results
from .hooks import GlobalLevelHook, ProfilerHook, ProgressLine, build_writers
from .iteration import EndOfIteration, LearningRate, drop_lines_from, flat_scores, has_scores
from .numerics import NumericalTrouble, Rewind
from .precision import autocast
from .random_state import random_states, restore_random_states
from .run_folder import CONFIG, METRICS, RunFolder, in_first_process
from .run_pictures import save_first_batch, save_predictions, save_training_curves
from .sharding import is_sharded, load_whole, shard_model, whole_copy
from .signals import RunStopped, StopSignals
from .trainer import Trainer

logger = logging.getLogger("focalnet_det")


def train(experiment: Experiment, folder: RunFolder, *, resume: bool = False) -> dict[str, Any]:
    """Train with periodic checkpoints and evaluations, and create the final outputs.

    Args:
        experiment: what to train.
        folder: of the run.
        resume: continue from the latest intact checkpoint in the folder, if there is one.
    Returns: results of the last evaluation, as from :func:`evaluate`.
    Raises: SystemExit with status 75 (130 after Ctrl-C) after a stop signal, once the state is
        saved; OSError if the disk is full; NumericalTrouble if a loss or a gradient is not finite;
        ValueError if the checkpoint does not match this run.
    """
    # Only one process of the job announces signals: the parent, if there is one.
    quiet = not comm.is_main_process() or multiprocessing.parent_process() is not None
    with StopSignals(quiet=quiet) as stop:
        try:
            return Training(experiment, folder, stop).run(resume=resume)
        except RunStopped as stopped:
            logger.warning("%s", stopped)
            raise SystemExit(stopped.exit_code) from None


class Training:
    """Components of a training, and the order of its steps.

    Args:
        experiment, folder: as in :func:`train`.
        stop: receiver of stop signals.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder, stop: StopSignals) -> None:
        self.experiment = experiment
        self.folder = folder
        self.stop = stop
        self.options = options = experiment.options
        if options.keep_best and not experiment.test_loaders:
            raise ValueError(
                f"train.keep_best={options.keep_best} requires a test set. Add one (for example "
                "with --val-json), or leave keep_best empty."
            )
        self.results: dict[str, Any] = {}
        self.is_evaluated = False
        self.done = 0
        self.loader = loader = experiment.train_loader()
        loader.seed = self._data_seed()
        if comm.is_main_process():
            loader.on_first_batch = lambda batch: save_first_batch(
                experiment, batch, loader.image_format
            )
        self.model = experiment.model().to(options.device)
        average = self._shard() if options.sharding else None
        optimizer = experiment.optimizer(self.model)
        self.max_iter = experiment.schedule.max_iter(loader.iterations_per_epoch)
        self.trainer = Trainer(
            self.model if options.sharding else create_ddp_model(self.model, **options.ddp),
            loader,
            optimizer,
            options,
            folder=folder.path,
            config_text=experiment.config_text,
            stop=stop,
            average=average,
        )
        check_agreement(
            {"the training data": loader.fingerprint, "the length": f"{self.max_iter} iterations"}
        )
        self.checkpoints = Checkpoints(
            folder.path, self.model, self.trainer, self._facts(), keep=options.keep_checkpoints
        )
        self.end_of_iteration = self._register_hooks()

    def _facts(self) -> RunFacts:
        """Describe the run, for its checkpoints."""
        return RunFacts(
            id=self.folder.record.id,
            config=self.experiment.config_text,
            data=self.loader.fingerprint,
            classes=self.experiment.class_names,
            metadata=self.experiment.dataset_metadata,
        )

    def _shard(self) -> AveragedModel | None:
        """Shard the model and its average, which is None without one."""
        decay = self.options.ema_decay
        # Sharded models cannot be copied.
        average = averaged_model(self.model, decay) if decay else None
        shard_model(self.model)
        if average is not None:
            shard_model(average.module)
        return average

    def _data_seed(self) -> int:
        """Return the seed of the config, the recorded one, or a new one, equal in all processes."""
        if self.options.seed >= 0:
            return self.options.seed
        # Drawn even if it is not used, so that resuming does not change the random states.
        drawn = comm.shared_random_seed()
        recorded = self.folder.record.data_seed
        return drawn if recorded is None else recorded

    def _register_hooks(self) -> EndOfIteration:
        options, epoch = self.options, self.loader.iterations_per_epoch
        end = EndOfIteration(
            self.checkpoints,
            self._evaluate,
            save_period=options.to_iterations(options.checkpoint_period, epoch),
            eval_period=options.to_iterations(options.eval_period, epoch),
            log_period=options.log_iterations,
        )
        self.trainer.register_hooks(
            [
                hooks.IterationTimer(),
                LearningRate(self.experiment.schedule.multiplier(epoch)),
                ProfilerHook(self.folder.path, *options.profile) if options.profile else None,
                # Before the checkpoint, which must include the updated level.
                GlobalLevelHook(options.growth_iterations),
                end,
            ]
        )
        return end

    def run(self, *, resume: bool) -> dict[str, Any]:
        """Train to the end, and create the final outputs."""
        describe(
            self.model, self.loader.num_images, self.loader.batch_size, self.max_iter, self.options
        )
        start = self._begin(resume=resume)
        in_first_process(lambda: self._note_start(anew=start == 0))
        while True:
            try:
                self._train_from(start)
                break
            except Rewind as rewind:
                start = self._rewind(rewind)
        logger.info("%s", self.trainer.total_tally().table())
        self._finish()
        return self.results

    def _note_start(self, *, anew: bool) -> None:
        facts = self.checkpoints.facts
        self.folder.note(facts.id, data_seed=self.loader.seed, data=facts.data, anew=anew)
        # Written only now, because a refused resumption must not replace the config.
        write_text(self.folder.path / CONFIG, facts.config)

    def _begin(self, *, resume: bool) -> int:
        """Load the last checkpoint or the initial weights, and return the first iteration."""
        if resume:
            content = self.checkpoints.resume()
            if content is not None:
                return self._continue(content)
            logger.info("No checkpoint in %s. Starting from the beginning.", self.folder.path)
        if self.options.init_checkpoint:
            levels = self.options.init_levels or None
            model = self._ordinary(self.model)
            report = load_initial_weights(model, self.options.init_checkpoint, levels=levels)
            if model is not self.model:
                load_whole(self.model, model.state_dict())
            logger.info("%s", report)
            # Loading with more focal levels changes the buffers of the model.
            self.trainer.start_average()
        if comm.is_main_process():
            # Metrics may remain from a run that was killed before its first checkpoint.
            drop_lines_from(self.folder.path / METRICS, 0)
            self.trainer.tally.add(self.loader.file_issues)
        return 0

    def _continue(self, content: dict[str, Any]) -> int:
        """Complete a pending evaluation of the checkpoint, and return the next iteration."""
        iteration = self.trainer.iter
        start = iteration + 1
        if comm.is_main_process():
            self.checkpoints.read_best(self.options.keep_best)
            drop_lines_from(self.folder.path / METRICS, start)
        logger.info("Resuming from iteration %d.", start)
        if content.get("pending") is not None:
            self._complete(iteration, content["pending"])
        final = self.folder.path / FINAL
        if start < self.max_iter and comm.is_main_process() and final.exists():
            # The schedule was extended, so this is no longer the final checkpoint.
            final.rename(final.with_name(f"model_{iteration:07d}.pth"))
        return start

    def _complete(self, iteration: int, pending: Mapping[str, float]) -> None:
        """Evaluate after an iteration and write its metrics, unless they are already on disk."""
        metrics = self.folder.path / METRICS
        if in_first_process(lambda: has_scores(metrics, iteration)):
            return
        done = iteration + 1
        logger.info("Repeating the interrupted evaluation after iteration %d.", done)
        if comm.is_main_process():
            drop_lines_from(metrics, iteration)
        self._open_writers(done)
        try:
            with EventStorage(iteration) as storage:
                storage.put_scalars(**pending, smoothing_hint=False)
                self.end_of_iteration.complete(iteration)
        finally:
            self._close_writers()

    def _train_from(self, start: int) -> None:
        self.done = max(start, self.max_iter)
        if start >= self.max_iter:
            logger.info("Training is already complete: %d of %d iterations.", start, self.max_iter)
            self.trainer.iter = start - 1
            if in_first_process(lambda: not (self.folder.path / FINAL).exists()):
                self.checkpoints.save(start - 1, final=True)
            return
        self._open_writers(start)
        try:
            self.trainer.train(start, self.max_iter)
        finally:
            self._close_writers()

    def _rewind(self, rewind: Rewind) -> int:
        """Return to the last checkpoint, and continue with different batches."""
        rewinds = self.trainer.rewinds + 1
        content = self.checkpoints.resume()
        if content is None:
            trouble = rewind.trouble
            raise NumericalTrouble(
                f"{trouble} There is no checkpoint to rewind to.", trouble.iteration
            )
        start = self._continue(content)
        self.trainer.rewinds = rewinds
        # The same batches would reproduce the error.
        self.loader.seed += rewinds
        self.trainer.restart_data()
        logger.warning(
            "%s Rewinding to iteration %d with different batches (%d of at most %d times).",
            rewind.trouble,
            start,
            rewinds,
            self.options.nan_limit,
        )
        return start

    def _ordinary(self, model: nn.Module) -> nn.Module:
        """Return a model, or an ordinary copy if it is sharded. Collective."""
        if not is_sharded(model):
            return model
        return whole_copy(model, self.experiment.model, self.options.device)

    def _evaluate(self, iteration: int) -> dict[str, float]:
        """Evaluate the model, save it if it is the best, and return its scores by name."""
        model = self._ordinary(self.trainer.evaluated_model)

        def stop_if_asked() -> None:
            if self.stop.received:
                raise RunStopped(self.stop.received, iteration + 1)

        # An evaluation may be repeated after an interruption, which must not affect the training.
        states = random_states(self.options.device)
        try:
            with autocast(self.options):
                self.results = evaluate(self.experiment, model, between=stop_if_asked)
        finally:
            restore_random_states(states, self.options.device)

        self.is_evaluated = True

        def keep() -> None:
            if self.experiment.test_loaders:
                write_results(self.folder.path, iteration, self.results)
            if self.options.keep_best:
                metric = self.options.keep_best
                self.checkpoints.save_best(model, metric, self._score(metric), iteration)

        in_first_process(keep)
        return flat_scores(self.results)

    def _score(self, name: str) -> float:
        """Return a metric of the first test set.

        Raises: KeyError if there is no such metric.
        """
        first: dict[str, Any] = next(iter(self.results.values()), {})
        task, _, metric = name.partition("/")
        if task not in first or metric not in first[task]:
            known = ", ".join(f"{t}/{m}" for t, metrics in first.items() for m in metrics)
            raise KeyError(f"Unknown metric {name!r} for train.keep_best. Known: {known}.")
        return float(first[task][metric])

    def _finish(self) -> None:
        """Create the final outputs."""
        iteration = self.done - 1
        # `is_evaluated` instead of `results`, which are empty on all but the main process.
        if self.experiment.test_loaders and not self.is_evaluated:
            saved = in_first_process(lambda: read_results(self.folder.path, iteration))
            if saved is None:
                self._evaluate(iteration)
            else:
                self.results = saved if comm.is_main_process() else {}

        def stop_if_asked() -> None:
            if self.stop.received:
                raise RunStopped(self.stop.received, iteration + 1)

        finish(self.folder, self.done, self._products(self.done), between=stop_if_asked)

    def _products(self, iterations: int) -> list[Product]:
        experiment, model = self.experiment, self._ordinary(self.trainer.evaluated_model)

        def averaged() -> bool:
            path = self.folder.path / AVERAGED
            described = self.checkpoints.facts.described()
            write_checkpoint(path, {"model": model.state_dict(), **described})
            logger.info("Saved averaged weights to %s.", path)
            return True

        def report(name: str) -> bool:
            results = {name: self.results[name]}
            write_reports(experiment, results, f"weights after {iterations:,} iterations")
            return True

        products = [
            Product(name="curves.png", make=lambda: save_training_curves(experiment)),
            Product(name="predictions.png", make=lambda: bool(save_predictions(experiment, model))),
        ]
        if self.trainer.ema is not None:
            products.append(Product(name=AVERAGED, make=averaged, required=True))
        for name in self.results if self.options.report else ():
            page = evaluation_folder(self.options, name) / "report.html"
            path = str(page.relative_to(Path(self.options.output_dir)))
            products.append(Product(name=path, make=partial(report, name)))
        return products

    def _open_writers(self, start: int) -> None:
        if comm.is_main_process():
            end = self.end_of_iteration
            end.progress = ProgressLine(self.max_iter, self.loader.batch_size)
            end.writers = build_writers(self.experiment, start)

    def _close_writers(self) -> None:
        for writer in self.end_of_iteration.writers:
            writer.close()
        self.end_of_iteration.writers = ()


def describe(
    model: nn.Module, num_images: int, batch_size: int, max_iter: int, options: TrainOptions
) -> None:
    """Log a summary of the training."""
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
            "The batch size of the recipe is %d, that of this run is %d. The linear scaling rule "
            "suggests multiplying the learning rate by %g, which is not done automatically.",
            options.recipe_batch,
            batch_size,
            batch_size / options.recipe_batch,
        )
