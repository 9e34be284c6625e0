"""One training iteration, and all the state that decides the next one."""

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

from ..checkpoint.global_level import saved_global_levels, set_global_levels
from ..data.instances.mappers import DATA_ISSUES
from ..data.issue_policies import IssueCounter
from ..data.loader import TrainLoader
from ..experiment import TrainOptions
from .ema import averaged_model
from .memory import OUT_OF_MEMORY, checkpoint_activations, explain_memory, is_out_of_memory
from .numerics import (
    MOST_OVERFLOWS,
    NumericalTrouble,
    describe_images,
    describe_trouble,
    gradient_norm,
    pack_example,
    write_trouble,
)
from .random_state import random_states, restore_random_states
from .resume import check_same_tensors, load_optimizer
from .signals import StopSignals

logger = logging.getLogger("focalnet_det")

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Rewind(Exception):
    """Numerical trouble asks to go back to the last checkpoint."""

    def __init__(self, trouble: NumericalTrouble) -> None:
        super().__init__(str(trouble))
        self.trouble = trouble


class Trainer(SimpleTrainer):
    """Train with autocast on any device, accumulation, clipping, averaged weights and checks.

    Args:
        model, data_loader, optimizer: as in SimpleTrainer.
        options: ``device``, ``precision``, ``accumulation``, ``clip_*``, ``ema_decay``,
            ``on_nan``, ``nan_limit`` and ``oom_retry`` are read.
        folder: gets a file that replays an iteration with numerical trouble; None for no file.
        config_text: of the whole config, for that file.
        stop: signals that ask to stop.

    Attributes:
        stop_signal: number of the signal that a process received, the same in all processes, as of
            the last iteration; 0 for none.
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
        # With DistributedDataParallel the parameters are those of the module inside.
        self.inner = getattr(model, "module", model)
        self.start_average()
        self.tally = IssueCounter()
        self.restart_data()

    def start_average(self) -> None:
        """Begin the moving average, if asked for, with the weights that the model has now."""
        decay = self.options.ema_decay
        self.ema = averaged_model(self.inner, decay) if decay else None

    def restart_data(self) -> None:
        """Open the stream of batches where the loader's ``seed`` and ``start`` say."""
        self._batches = iter(self.data_loader)

    @property
    def evaluated_model(self) -> nn.Module:
        """The averaged weights where there are some, or else the model, without its DDP wrapper."""
        return self.inner if self.ema is None else self.ema.module

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run iterations ``start_iter`` to ``max_iter - 1``.

        Unlike Detectron2's loop, an error ends it at once: what hooks do after a training is for
        trainings that came to their end.
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
        """One iteration: data, forward, backward, update, metrics."""
        start = time.perf_counter()
        data = next(self._batches)
        data_time = time.perf_counter() - start
        for example in data:
            self.tally.add(example.pop(DATA_ISSUES, {}))
        # Taken back if the iteration is computed again.
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
            # Detectron2 looks at some predictions itself.
            self._after_trouble({}, data, states, said=str(error))
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
        """Copy losses and gradient norm to the CPU, at once, and look for trouble in any process.

        Every copy of its own would wait for the device.

        Returns: losses on the CPU, the norm, and whether the update must not be made; the last is
            the same in all processes, and so is ``stop_signal``.
        """
        # The scaler leaves out updates whose gradients overflow.
        judged = list(losses.values()) + ([] if self.scaler.is_enabled() else [norm])
        numbers = torch.stack([t.detach().float() for t in (*losses.values(), norm)])
        finite = torch.stack([t.detach().float() for t in judged]).isfinite().all()
        flags = torch.stack(
            [(~finite).float(), torch.full_like(norm, self.stop.received, dtype=torch.float32)]
        )
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        *values, total_norm, bad, stop = torch.cat([numbers, flags]).cpu().unbind()
        self.stop_signal = int(stop)
        self.overflows = 0 if total_norm.isfinite() else self.overflows + 1
        collapsed = self.scaler.is_enabled() and self.overflows > MOST_OVERFLOWS
        return dict(zip(losses, values, strict=True)), float(total_norm), bool(bad) or collapsed

    def _after_trouble(
        self,
        losses: dict[str, Tensor],
        data: list[dict[str, Any]],
        states: dict[str, Any],
        *,
        said: str = "",
    ) -> None:
        """Leave the update out, or raise.

        Args:
            losses, data, states: of the iteration.
            said: by the model itself, in this process alone; the others are still computing, and
                this one can only end.
        """
        trouble = self._describe(losses, data, states, said)
        if said and comm.get_world_size() > 1:
            raise trouble
        self.optimizer.zero_grad(set_to_none=True)
        if not said:
            # Without an update the scaler would refuse the next iteration.
            self.scaler.update()
        limit = self.options.nan_limit
        if self.options.on_nan == "skip" and self.skipped < limit:
            self.skipped += 1
            self.overflows = 0
            self.storage.put_scalar("skipped_iterations", self.skipped, smoothing_hint=False)
            logger.warning("%s Update left out, %d of at most %d.", trouble, self.skipped, limit)
            return
        if self.options.on_nan == "rewind" and self.rewinds < limit:
            raise Rewind(trouble)
        if self.options.on_nan != "stop":
            used_up = f"{trouble} Going on was allowed {limit} times (train.nan_limit)."
            raise NumericalTrouble(used_up, self.iter)
        raise trouble

    def _describe(
        self,
        losses: dict[str, Tensor],
        data: list[dict[str, Any]],
        states: dict[str, Any],
        said: str,
    ) -> NumericalTrouble:
        """Say what happened, in words and as a file; the same in all processes."""
        if said:
            reason = f"{said.rstrip('.')}. {describe_images(data)}"
        elif self.scaler.is_enabled() and self.overflows > MOST_OVERFLOWS:
            reason = (
                f"{self.overflows} updates in a row overflowed in fp16; the loss scale has fallen "
                f"to {self.scaler.get_scale():g}. Try train.precision=bf16 or a lower rate"
            )
        else:
            reason = describe_trouble(losses, self.inner, data)
        guilty = not all(loss.isfinite() for loss in losses.values())
        mine = {"random": states, "data": [pack_example(e) for e in data]}
        reasons = [(False, reason)] if said else comm.all_gather((not guilty, reason))
        packed = [mine] if said else comm.gather(mine)
        replay = ""
        if self.folder is not None:
            path = self.folder / f"trouble_{self.iter:07d}.pth"
            replay = f" To look into it: tools/replay_step.py {path}."
            if said or comm.is_main_process():
                content = {"iteration": self.iter, "config": self.config_text, "processes": packed}
                write_trouble(path, {**content, "model": self.inner.state_dict()})
        advice = (
            " Lower the learning rate, set train.clip_norm, or let train.on_nan=skip or rewind "
            "go on."
        )
        innocent, reason = min(reasons)
        if innocent and len(reasons) > 1:
            # Gradients are exchanged before they are looked at.
            reason += ", or those of another process"
        return NumericalTrouble(
            f"Iteration {self.iter + 1}: {reason}.{replay}"
            + (advice if self.options.on_nan == "stop" else ""),
            self.iter,
        )

    def _after_out_of_memory(self, data: list[dict[str, Any]], error: Exception) -> None:
        """Free what the iteration holds and switch activation checkpointing on, or raise."""
        text = explain_memory(self.inner, self.optimizer, data, self.options)
        error = error.with_traceback(None)  # its frames hold the activations
        alone = comm.get_world_size() == 1
        if not (self.options.oom_retry and alone and checkpoint_activations(self.inner)):
            raise MemoryError(text) from error
        logger.warning("%s Trying again with activation checkpointing from here on.", text)
        self.optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

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

    def total_tally(self) -> IssueCounter:
        """Of all processes, in the first one. To be called in all processes."""
        total = IssueCounter()
        for tally in comm.gather(self.tally):
            total.merge(tally)
        return total

    def clip_gradients(self) -> None:
        """Clip by value and by norm, as the options say."""
        if self.options.clip_value:
            nn.utils.clip_grad_value_(self.model.parameters(), self.options.clip_value)
        if self.options.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)

    def state_dict(self) -> dict[str, Any]:
        """Return all that decides how the training goes on. To be called in all processes."""
        state: dict[str, Any] = {"iteration": self.iter}
        state["optimizer"] = self.optimizer.state_dict()
        state["scaler"] = self.scaler.state_dict()
        state["data_seed"] = self.data_loader.seed
        state["skipped"] = self.skipped
        state["rewinds"] = self.rewinds
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        state["tally"] = self.total_tally().state_dict()
        state["random"] = comm.gather(random_states(self.options.device))
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, also one that Detectron2's own trainers saved.

        What a file does not hold stays as it is, and is named in a warning. Learning rate, weight
        decay and the other options of the optimizer stay those of this run's config.

        Raises: ValueError if the optimizer or the averaged weights are those of another model.
        """
        # DefaultTrainer keeps the state of its inner trainer under a name of its own.
        state = {**state, **state.get("_trainer", {})}
        self.iter = state["iteration"]
        if "optimizer" in state:
            load_optimizer(self.optimizer, state["optimizer"])
        else:
            logger.warning("The checkpoint holds no optimizer state: its moments start from zero.")
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
                logger.warning("The checkpoint's averaged weights are left: ema_decay is 0.")
            return
        if "ema" not in state:
            logger.warning("The checkpoint holds no averaged weights: they start from its weights.")
            self.start_average()
            return
        set_global_levels(self.ema, saved_global_levels(state["ema"]))
        check_same_tensors(state["ema"], self.ema.state_dict(), "the averaged weights")
        self.ema.load_state_dict(state["ema"])

    def _load_random(self, states: Sequence[dict[str, Any]]) -> None:
        if len(states) == comm.get_world_size():
            restore_random_states(states[comm.get_rank()], self.options.device)
            return
        logger.warning(
            "The checkpoint holds the random states of %d processes, this run has %d: they start "
            "anew, so the losses will not be those of an uninterrupted run.",
            len(states),
            comm.get_world_size(),
        )


def send_images(data: list[dict[str, Any]], device: str) -> None:
    """Starts the copies of images to a GPU, in place, without waiting for them."""
    if device.split(":")[0] == "cuda":
        for example in data:
            example["image"] = example["image"].to(device, non_blocking=True)


def autocast(options: TrainOptions) -> contextlib.AbstractContextManager[Any]:
    """Autocast as the options say, or nothing for fp32."""
    if options.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(options.device.split(":")[0], AUTOCAST_DTYPES[options.precision])
