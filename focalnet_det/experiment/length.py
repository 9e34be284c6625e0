"""Compute the length of a training after overrides and for the user's own data sets."""

import logging
import math
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

from .options import TrainOptions
from .settings import Given, Settings
from .solver import Schedule

logger = logging.getLogger("focalnet_det")

# From random or ImageNet weights, small data sets need more epochs than large ones.
EPOCHS = 60
MIN_ITERATIONS = 1000
MAX_ITERATIONS = 90_000
MIN_EPOCHS = 12
# Largest number of evaluations, and of periodic checkpoints, of a training on the user's own data.
MAX_PERIODS = 12


@dataclass(frozen=True, kw_only=True)
class Length:
    """Length and milestones of a training, in epochs or iterations; the other one is None."""

    epochs: float | None
    iterations: int | None
    milestones: tuple[float, ...] = ()

    @property
    def total(self) -> float:
        """Return the length in its unit, 0 if it is not set."""
        return self.iterations or self.epochs or 0


def scale_milestones(
    before: Length, after: Length, given: Container[str], keys: dict[str, str]
) -> Length:
    """Scale the milestones with an overridden length, and return the length in one unit.

    Args:
        before, after: lengths of the config without and with its overrides.
        given: those of "epochs", "iterations" and "milestones" that are overridden.
        keys: their keys in the config, for the log.
    """
    if "iterations" in given and "epochs" not in given:
        after = replace(after, epochs=None)
    elif "epochs" in given and "iterations" not in given:
        after = replace(after, iterations=None)
    elif "epochs" not in given:
        return after
    both = after.epochs is not None and after.iterations is not None
    numbers = all(isinstance(length.total, int | float) for length in (before, after))
    if both or not numbers or before.total <= 0 or after.total <= 0:
        return after
    if after.milestones and "milestones" not in given:
        factor = after.total / before.total
        digits = 0 if after.iterations else 2
        scaled = tuple(round(m * factor, digits) for m in before.milestones)
        scaled = tuple(int(m) if after.iterations else m for m in scaled)
        unit = "iterations" if after.iterations else "epochs"
        if scaled != before.milestones:
            listed = ", ".join(f"{m:g}" for m in scaled)
            logger.info(
                "Milestones are scaled to the length of %g %s: %s. To set them: %s.",
                after.total, unit, listed, keys["milestones"],
            )  # fmt: skip
        return replace(after, milestones=scaled)
    return after


@dataclass(frozen=True, kw_only=True)
class TrainingLength:
    """Batch size and length of a training on the user's own data, with the reason."""

    batch_size: int
    iterations: int
    reason: str


def training_length(
    num_images: int, batch_size: int, processes: int = 1, *, keep_batch: bool = False
) -> TrainingLength:
    """Choose batch size and length for a data set of a given size.

    The batch is not larger than the data set unless it is kept. The length is 60 epochs, but at
    least 1,000 iterations, and at most 90,000 iterations or 12 epochs, whichever is longer.

    Args:
        num_images: number of annotated training images.
        batch_size: batch size of the config.
        processes: number of processes times accumulation steps; the batch is divisible by it.
        keep_batch: do not reduce the batch size.
    """
    batch = batch_size
    if num_images < batch_size and not keep_batch:
        batch = max(1, num_images // processes) * processes
    per_epoch = max(1, math.ceil(num_images / batch))
    most = max(MAX_ITERATIONS, MIN_EPOCHS * per_epoch)
    iterations = min(max(EPOCHS * per_epoch, MIN_ITERATIONS), most)
    reason = (
        f"{num_images} training images in batches of {batch}: {iterations} iterations, "
        f"{iterations / per_epoch:.0f} passes over the data"
    )
    if batch < batch_size:
        reason += f"; the batch size of the config, {batch_size}, is larger than the data set"
    return TrainingLength(batch_size=batch, iterations=iterations, reason=reason)


def fit_length(settings: Settings, given: Given, num_images: int, processes: int) -> Settings:
    """Fit batch, learning rate, schedule and periods to a data set, and log the reason.

    An explicit length or learning rate is kept.
    """
    before, options = settings.schedule, settings.options
    if "length" not in given:
        length = training_length(
            num_images,
            settings.batch_size,
            processes * options.accumulation,
            keep_batch="batch_size" in given,
        )
        settings = with_length(settings, length, given)
        logger.info(
            "%s; learning rate %g. For another length: %s.",
            length.reason,
            settings.learning_rate,
            given.override("iterations", "N"),
        )
    per_epoch = max(1, math.ceil(num_images / settings.batch_size))
    options = fit_periods(settings.options, before, settings.schedule, per_epoch, given)
    return replace(settings, options=options)


def with_length(settings: Settings, length: TrainingLength, given: Given) -> Settings:
    """Return settings with a batch and length, and scale everything else that is not overridden."""
    schedule, options, batch = settings.schedule, settings.options, settings.batch_size
    milestones, warmup, rate = schedule.milestones, schedule.warmup_iterations, 1.0
    if "milestones" not in given:
        factor = length.iterations / schedule.length
        milestones = tuple(round(milestone * factor) for milestone in milestones)
    if "warmup" not in given:
        warmup = min(warmup, length.iterations // 10)
    if "learning_rate" not in given:
        rate = length.batch_size / batch
    if options.recipe_batch == batch:
        options = replace(options, recipe_batch=length.batch_size)
    schedule = replace(
        schedule,
        epochs=None,
        iterations=length.iterations,
        milestones=milestones,
        warmup_iterations=warmup,
    )
    return replace(
        settings,
        schedule=schedule,
        options=options,
        batch_size=length.batch_size,
        learning_rate=settings.learning_rate * rate,
    )


def fit_periods(
    options: TrainOptions, before: Schedule, after: Schedule, per_epoch: int, given: Given
) -> TrainOptions:
    """Scale the periods with the length of the training, in iterations.

    There are at most 12 periods. An explicit period is kept, and so is 0.
    """
    total = after.max_iter(per_epoch)
    in_epochs = options.period_unit == "epochs"
    changes: dict[str, Any] = {}
    for name in ("eval_period", "checkpoint_period"):
        period: float = getattr(options, name)
        if "period_unit" in given or (name in given and period):
            return options
        if not period:
            continue
        if in_epochs == (before.iterations is None):
            period *= total / before.length
        elif in_epochs:
            period *= per_epoch
        changes[name] = max(round(period), math.ceil(total / MAX_PERIODS))
    return replace(options, period_unit="iterations", **changes) if changes else options


def shorten_warmup(schedule: Schedule, iterations_per_epoch: int, given: Given) -> Schedule:
    """Shorten a warm-up of more than half the training to a tenth of it, and log that.

    Raises: ValueError if an explicit warm-up is not shorter than the training.
    """
    total, warmup = schedule.max_iter(iterations_per_epoch), schedule.warmup_iterations
    key = given.key("warmup")
    if "warmup" in given:
        if warmup >= total and total > 1:
            raise ValueError(
                f"{key} of {warmup} is not shorter than the training of {total} iterations: the "
                "full learning rate would never be reached."
            )
        return schedule
    if warmup <= total // 2:
        return schedule
    shorter = total // 10
    logger.warning(
        "The warm-up of %d iterations is shortened to %d, a tenth of the training. To set it: %s.",
        warmup, shorter, given.override("warmup", "N"),
    )  # fmt: skip
    return replace(schedule, warmup_iterations=shorter)
