"""Run training iterations, and save and restore the training state."""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..checkpoint.global_level import saved_global_levels, set_global_levels
from ..data.instances.mappers import DATA_ISSUES
from ..data.issue_policies import IssueCounter
from ..data.loader import TrainLoader
from ..experiment import TrainOptions
from .ema import start_average
from .memory import OUT_OF_MEMORY, checkpoint_activations, explain_memory, is_out_of_memory
from .numerics import (
    MAX_OVERFLOWS,
    NumericalTrouble,
    Rewind,
    describe_images,
    describe_trouble,
    gradient_norm,
    pack_example,
    write_trouble,
)
from .precision import autocast
from .random_state import random_states, restore_random_states
from .resume import check_same_tensors, load_optimizer
from .sharding import gathered, is_sharded, load_whole
from .signals import StopSignals

logger = logging.getLogger("focalnet_det")

ADVICE = " Lower the learning rate, set train.clip_norm, or use train.on_nan=skip or rewind."


class Trainer(SimpleTrainer):
    """Trainer with autocast, gradient accumulation, clipping, EMA weights and numerical checks.

    Args:
        model, data_loader, optimizer: as in SimpleTrainer.
        options: uses ``device``, ``precision``, ``accumulation``, ``clip_*``, ``ema_decay``,
            ``on_nan``, ``nan_limit`` and ``oom_retry``.
        folder: for a file that replays an iteration with NaN or infinity; None for no file.
        config_text: full config, for that file.
        stop: receiver of stop signals.
        average: EMA of a sharded model; those of others are created.

    Attributes:
        stop_signal: number of the stop signal that any process had received as of the last
            iteration, equal in all processes; 0 for none.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: TrainLoader,
        optimizer: torch.optim.Optimizer,
        options: TrainOptions,
        *,
        folder: Path | None = None,
        config_text: str = "",
        stop: StopSignals | None = None,
        average: AveragedModel | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.options = options
        self.folder = folder
        self.config_text = config_text
        self.stop = stop or StopSignals()
        self.stop_signal = 0
        self.skipped = 0
        self.rewinds = 0
        self.overflows = 0
        device = options.device.split(":")[0]
        self.scaler = torch.amp.GradScaler(device, enabled=options.precision == "fp16")
        # Unwraps DistributedDataParallel.
        self.inner = getattr(model, "module", model)
        self.ema = average
        self.start_average()
        self.tally = IssueCounter()
        self.restart_data()

    def start_average(self) -> None:
        """Initialize the EMA, if enabled, with the current weights."""
        self.ema = start_average(self.inner, self.options.ema_decay, self.ema)

    def restart_data(self) -> None:
        """Reopen the stream of batches at the ``seed`` and ``start`` of the loader."""
        self._batches = iter(self.data_loader)

    @property
    def evaluated_model(self) -> nn.Module:
        """The EMA model if enabled, or else the model, without its DDP wrapper."""
        return self.inner if self.ema is None else self.ema.module

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run iterations ``start_iter`` to ``max_iter - 1``.

        Unlike in Detectron2's loop, ``after_train`` hooks do not run after an error.
        """
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            self.before_train()
            for self.iter in range(start_iter, max_iter):
                self.before_step()
                self.run_step()
                self.after_step()
            self.iter += 1
            self.after_train()

    def run_step(self) -> None:
        """Run one iteration: data, forward, backward, update, metrics."""
        start = time.perf_counter()
        data = next(self._batches)
        data_time = time.perf_counter() - start
        for example in data:
            self.tally.add(example.pop(DATA_ISSUES, {}))
        # Restored if the iteration is retried.
        states = random_states(self.options.device)
        send_images(data, self.options.device)
        try:
            self._update(data, data_time, states)
        except OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
            self._after_out_of_memory(data, error)
            restore_random_states(states, self.options.device)
            self._update(data, data_time, states)

    def _update(self, data: list[dict[str, Any]], data_time: float, states: dict[str, Any]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        try:
            losses = self.accumulate_gradients(data)
        except FloatingPointError as error:
            # Raised by Detectron2's own checks of predictions.
            self._after_trouble({}, data, states, model_error=str(error))
            return
        self.scaler.unscale_(self.optimizer)
        losses, norm, bad = self._checked(losses, gradient_norm(self.inner.parameters()))
        if bad:
            self._after_trouble(losses, data, states)
            return
        self._write_metrics(losses, data_time)
        self.storage.put_scalar("grad_norm", norm, smoothing_hint=False)
        with torch.profiler.record_function("optimizer"):
            self.clip_gradients()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.inner)

    def _checked(
        self, losses: dict[str, Tensor], norm: Tensor
    ) -> tuple[dict[str, Tensor], float, bool]:
        """Copy losses and gradient norm to the CPU, and check them across processes.

        A single copy is used, since each one synchronizes with the device.

        Returns: losses on the CPU, the norm, and whether the update must be skipped, which is equal
            in all processes, like ``stop_signal``.
        """
        # The scaler itself skips updates whose gradients overflow.
        checked = list(losses.values()) + ([] if self.scaler.is_enabled() else [norm])
        numbers = torch.stack([t.detach().float() for t in (*losses.values(), norm)])
        finite = torch.stack([t.detach().float() for t in checked]).isfinite().all()
        flags = torch.stack(
            [(~finite).float(), torch.full_like(norm, self.stop.received, dtype=torch.float32)]
        )
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        *values, total_norm, bad, stop = torch.cat([numbers, flags]).cpu().unbind()
        self.stop_signal = int(stop)
        self.overflows = 0 if total_norm.isfinite() else self.overflows + 1
        collapsed = self.scaler.is_enabled() and self.overflows > MAX_OVERFLOWS
        return dict(zip(losses, values, strict=True)), float(total_norm), bool(bad) or collapsed

    def _after_trouble(
        self,
        losses: dict[str, Tensor],
        data: list[dict[str, Any]],
        states: dict[str, Any],
        *,
        model_error: str = "",
    ) -> None:
        """Skip the update, or raise.

        Args:
            losses, data, states: of the iteration.
            model_error: message of an error that the model raised in this process alone. The other
                processes are still computing, so no collective calls are possible.
        """
        trouble = self._describe(losses, data, states, model_error)
        if model_error and comm.get_world_size() > 1:
            raise trouble
        self.optimizer.zero_grad(set_to_none=True)
        if not model_error:
            # The scaler requires an update between two calls of `unscale_`.
            self.scaler.update()
        limit = self.options.nan_limit
        if self.options.on_nan == "skip" and self.skipped < limit:
            self.skipped += 1
            self.overflows = 0
            self.storage.put_scalar("skipped_iterations", self.skipped, smoothing_hint=False)
            logger.warning("%s Skipped update %d of at most %d.", trouble, self.skipped, limit)
            return
        if self.options.on_nan == "rewind" and self.rewinds < limit:
            raise Rewind(trouble)
        if self.options.on_nan != "stop":
            raise NumericalTrouble(
                f"{trouble} The limit of {limit} (train.nan_limit) is reached.", self.iter
            )
        raise trouble

    def _describe(
        self,
        losses: dict[str, Tensor],
        data: list[dict[str, Any]],
        states: dict[str, Any],
        model_error: str,
    ) -> NumericalTrouble:
        """Describe the error and write a replay file; the result is equal in all processes."""
        reason = self._reason(losses, data, model_error)
        losses_are_finite = all(loss.isfinite() for loss in losses.values())
        reasons = [(False, reason)] if model_error else comm.all_gather((losses_are_finite, reason))
        replay = self._write_replay(data, states, gather=not model_error)
        # Processes with non-finite losses come first.
        losses_are_finite, reason = min(reasons)
        if losses_are_finite and len(reasons) > 1:
            # Gradients are averaged over processes before the check, so their origin is unknown.
            reason += ", or those of another process"
        advice = ADVICE if self.options.on_nan == "stop" else ""
        return NumericalTrouble(f"Iteration {self.iter + 1}: {reason}.{replay}{advice}", self.iter)

    def _reason(
        self, losses: dict[str, Tensor], data: list[dict[str, Any]], model_error: str
    ) -> str:
        if model_error:
            return f"{model_error.rstrip('.')}. {describe_images(data)}"
        if self.scaler.is_enabled() and self.overflows > MAX_OVERFLOWS:
            return (
                f"{self.overflows} consecutive updates overflowed in fp16, and the loss scale fell "
                f"to {self.scaler.get_scale():g}. Try train.precision=bf16 or a lower learning rate"
            )
        return describe_trouble(losses, self.inner, data)

    def _write_replay(
        self, data: list[dict[str, Any]], states: dict[str, Any], *, gather: bool
    ) -> str:
        """Write a file that replays the iteration; return a hint at it, "" without a folder."""
        local = {"random": states, "data": [pack_example(sample) for sample in data]}
        processes = comm.gather(local) if gather else [local]
        if self.folder is None:
            return ""
        if not gather and is_sharded(self.inner):
            return ""  # the weights cannot be collected
        path = self.folder / f"trouble_{self.iter:07d}.pth"
        weights = gathered(self.inner.state_dict())
        if not gather or comm.is_main_process():
            content = {"iteration": self.iter, "config": self.config_text, "processes": processes}
            write_trouble(path, {**content, "model": weights})
        return f" To investigate, run tools/replay_step.py {path}."

    def _after_out_of_memory(self, data: list[dict[str, Any]], error: Exception) -> None:
        """Free the memory of the iteration and enable activation checkpointing, or raise."""
        text = explain_memory(self.inner, self.optimizer, data, self.options)
        error = error.with_traceback(None)  # its frames hold the activations
        alone = comm.get_world_size() == 1
        if not (self.options.oom_retry and alone and checkpoint_activations(self.inner)):
            raise MemoryError(text) from error
        logger.warning("%s Retrying with activation checkpointing, which remains enabled.", text)
        self.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def accumulate_gradients(self, data: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Accumulate gradients over the parts of a batch, and return the mean losses.

        Raises: ValueError if the batch cannot be split evenly.
        """
        parts = self.options.accumulation
        size, rest = divmod(len(data), parts)
        if rest:
            raise ValueError(
                f"A batch of {len(data)} images per process cannot be split evenly into {parts} "
                "parts (train.accumulation)."
            )
        means: dict[str, Tensor] = {}
        for part in range(parts):
            # Gradients are synchronized between processes only once per iteration.
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
        """Return DistributedDataParallel's ``no_sync``, or a null context."""
        no_sync = getattr(self.model, "no_sync", contextlib.nullcontext)
        return cast(contextlib.AbstractContextManager[Any], no_sync())

    def total_tally(self) -> IssueCounter:
        """Sum the issues of all processes on the main one. Collective: call it in all processes."""
        total = IssueCounter()
        for tally in comm.gather(self.tally):
            total.merge(tally)
        return total

    def clip_gradients(self) -> None:
        """Clip gradients by value and by norm, if enabled."""
        if self.options.clip_value:
            nn.utils.clip_grad_value_(self.model.parameters(), self.options.clip_value)
        if self.options.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)

    def state_dict(self) -> dict[str, Any]:
        """Return the training state. Collective: call it in all processes."""
        state: dict[str, Any] = {"iteration": self.iter}
        state["optimizer"] = gathered(self.optimizer.state_dict())
        state["scaler"] = self.scaler.state_dict()
        state["data_seed"] = self.data_loader.seed
        state["skipped"] = self.skipped
        state["rewinds"] = self.rewinds
        if self.ema is not None:
            state["ema"] = gathered(self.ema.state_dict())
        state["tally"] = self.total_tally().state_dict()
        state["random"] = comm.gather(random_states(self.options.device))
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a training state, including those of Detectron2's trainers.

        Missing parts are left unchanged, with a warning. Learning rate, weight decay and other
        options of the optimizer remain those of this run's config.

        Raises: ValueError if the optimizer or the EMA weights belong to another model.
        """
        # DefaultTrainer nests the state of its inner trainer.
        state = {**state, **state.get("_trainer", {})}
        self.iter = state["iteration"]
        if "optimizer" in state:
            load_optimizer(self.optimizer, state["optimizer"])
        else:
            logger.warning("The checkpoint has no optimizer state. Moments start from zero.")
        scaler = state.get("scaler") or state.get("grad_scaler")
        if scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)
        self.data_loader.seed = state.get("data_seed", self.data_loader.seed)
        self.data_loader.start = self.iter + 1
        self.skipped = state.get("skipped", 0)
        self.rewinds = state.get("rewinds", 0)
        self._load_average(state)
        self.tally = IssueCounter()
        if "tally" in state and comm.is_main_process():
            self.tally.load_state_dict(state["tally"])
        self._load_random(state.get("random", []))

    def _load_average(self, state: Mapping[str, Any]) -> None:
        if self.ema is None:
            if "ema" in state:
                logger.warning("Ignored the averaged weights of the checkpoint: ema_decay is 0.")
            return
        if "ema" not in state:
            logger.warning("The checkpoint has no averaged weights. They start from its weights.")
            self.start_average()
            return
        set_global_levels(self.ema, saved_global_levels(state["ema"]))
        check_same_tensors(state["ema"], self.ema.state_dict(), "the averaged weights")
        load_whole(self.ema, state["ema"])

    def _load_random(self, states: Sequence[dict[str, Any]]) -> None:
        if len(states) == comm.get_world_size():
            restore_random_states(states[comm.get_rank()], self.options.device)
            return
        logger.warning(
            "The checkpoint has random states of %d processes, but this run has %d. They are "
            "reinitialized, so losses will differ from those of an uninterrupted run.",
            len(states),
            comm.get_world_size(),
        )


def send_images(data: list[dict[str, Any]], device: str) -> None:
    """Move the images of samples to a GPU, in place and asynchronously."""
    if device.split(":")[0] == "cuda":
        for sample in data:
            sample["image"] = sample["image"].to(device, non_blocking=True)
