"""Length of a training: after an override, on data of one's own, and beside its warm-up."""

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
FEWEST_ITERATIONS = 1000
MOST_ITERATIONS = 90_000
FEWEST_EPOCHS = 12
# Evaluations and periodic checkpoints of a training on one's own data.
MOST_PERIODS = 12


@dataclass(frozen=True, kw_only=True)
class Length:
    """Length and milestones, in epochs or in iterations; the other one is None."""

    epochs: float | None
    iterations: int | None
    milestones: tuple[float, ...] = ()

    @property
    def total(self) -> float:
        """Return the length in its unit, 0 if there is none."""
        return self.iterations or self.epochs or 0


def follow_override(
    before: Length, after: Length, given: Container[str], keys: dict[str, str]
) -> Length:
    """Return a length that an override set, in one unit, with milestones that follow it.

    Args:
        before, after: of the config without and with its overrides.
        given: of "epochs", "iterations" and "milestones" those that were overridden.
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
        moved = tuple(round(m * factor, digits) for m in before.milestones)
        moved = tuple(int(m) if after.iterations else m for m in moved)
        unit = "iterations" if after.iterations else "epochs"
        if moved != before.milestones:
            listed = ", ".join(f"{m:g}" for m in moved)
            logger.info(
                "Milestones follow the length of %g %s: %s. To set them: %s.",
                after.total, unit, listed, keys["milestones"],
            )  # fmt: skip
        return replace(after, milestones=moved)
    return after


@dataclass(frozen=True, kw_only=True)
class TrainingLength:
    """Batch and length of a training on one's own data, and the reason in words."""

    batch_size: int
    iterations: int
    reason: str


def training_length(
    num_images: int, batch_size: int, processes: int = 1, *, keep_batch: bool = False
) -> TrainingLength:
    """Return batch and length for a data set of some size.

    The batch is at most the data set, unless it is to be kept. 60 epochs, but at least 1,000
    iterations; and at most 90,000, unless these are fewer than 12 epochs.

    Args:
        num_images: with annotations, in the training set.
        batch_size: of the config.
        processes: that share the batch evenly, times the parts that each accumulates.
    """
    batch = batch_size
    if num_images < batch_size and not keep_batch:
        batch = max(1, num_images // processes) * processes
    per_epoch = max(1, math.ceil(num_images / batch))
    most = max(MOST_ITERATIONS, FEWEST_EPOCHS * per_epoch)
    iterations = min(max(EPOCHS * per_epoch, FEWEST_ITERATIONS), most)
    reason = (
        f"{num_images} training images in batches of {batch}: {iterations} iterations, "
        f"{iterations / per_epoch:.0f} passes over the data"
    )
    if batch < batch_size:
        reason += f"; the config's batch of {batch_size} is larger than the data set"
    return TrainingLength(batch_size=batch, iterations=iterations, reason=reason)


def fit_length(settings: Settings, given: Given, num_images: int, processes: int) -> Settings:
    """Return settings whose batch, rate, schedule and periods fit a data set, and log why.

    A length or a learning rate that was given stays.
    """
    before, options = settings.schedule, settings.options
    if "length" not in given:
        found = training_length(
            num_images,
            settings.batch_size,
            processes * options.accumulation,
            keep_batch="batch_size" in given,
        )
        settings = with_length(settings, found, given)
        logger.info(
            "%s; learning rate %g. For another length: %s.",
            found.reason,
            settings.learning_rate,
            given.override("iterations", "N"),
        )
    per_epoch = max(1, math.ceil(num_images / settings.batch_size))
    options = fit_periods(settings.options, before, settings.schedule, per_epoch, given)
    return replace(settings, options=options)


def with_length(settings: Settings, found: TrainingLength, given: Given) -> Settings:
    """Return settings with batch and length, and what follows from these unless it was given."""
    schedule, options, batch = settings.schedule, settings.options, settings.batch_size
    milestones, warmup, rate = schedule.milestones, schedule.warmup_iterations, 1.0
    if "milestones" not in given:
        share = found.iterations / schedule.length
        milestones = tuple(round(milestone * share) for milestone in milestones)
    if "warmup" not in given:
        warmup = min(warmup, found.iterations // 10)
    if "learning_rate" not in given:
        rate = found.batch_size / batch
    if options.recipe_batch == batch:
        options = replace(options, recipe_batch=found.batch_size)
    schedule = replace(
        schedule,
        epochs=None,
        iterations=found.iterations,
        milestones=milestones,
        warmup_iterations=warmup,
    )
    return replace(
        settings,
        schedule=schedule,
        options=options,
        batch_size=found.batch_size,
        learning_rate=settings.learning_rate * rate,
    )


def fit_periods(
    options: TrainOptions, before: Schedule, after: Schedule, per_epoch: int, given: Given
) -> TrainOptions:
    """Return options whose periods, in iterations, keep their share of the length.

    At most 12 periods of a training are left; a period that was given stays, and so does 0.
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
        changes[name] = max(round(period), math.ceil(total / MOST_PERIODS))
    return replace(options, period_unit="iterations", **changes) if changes else options


def settle_warmup(schedule: Schedule, iterations_per_epoch: int, given: Given) -> Schedule:
    """Return a schedule whose warm-up leaves something to train, and log a shorter one.

    Raises: ValueError if a warm-up that was given is not shorter than the training.
    """
    total, warmup = schedule.max_iter(iterations_per_epoch), schedule.warmup_iterations
    key = given.key("warmup")
    if "warmup" in given:
        if warmup >= total and total > 1:
            raise ValueError(
                f"{key} of {warmup} is not shorter than the training of {total} iterations: the "
                "learning rate would never be reached."
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
