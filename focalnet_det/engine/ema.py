"""Maintain an exponential moving average of the weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .sharding import is_sharded, local_part


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    """Create an EMA copy of a model: ``average = decay * average + (1 - decay) * weight``.

    The decay of update n is at most ``(1 + n) / (10 + n)``, so that the random initial weights fade
    quickly. Buffers are averaged too; integer buffers are copied.

    Raises: ValueError unless 0 < decay < 1.
    Source: tensorflow/tensorflow:tensorflow/python/training/moving_averages.py
    (ExponentialMovingAverage, num_updates).
    """
    if not 0 < decay < 1:
        raise ValueError(f"ema_decay must be between 0 and 1, got {decay}.")

    def update(
        averages: Sequence[Tensor], weights: Sequence[Tensor], updates: Tensor | int
    ) -> None:
        n = int(updates)
        averages, weights = ([local_part(t) for t in x] for x in (averages, weights))
        share = 1 - min(decay, (1 + n) / (10 + n))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, weights, share)
        else:
            torch._foreach_copy_(averages, weights)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def start_average(
    model: nn.Module, decay: float, average: AveragedModel | None
) -> AveragedModel | None:
    """Return an average that begins with the current weights of a model; None without a decay.

    Args:
        decay: see `averaged_model`; 0 for no average.
        average: of a sharded model, which cannot be copied: it is set to the weights.
    """
    if not decay:
        return None
    if not is_sharded(model):
        return averaged_model(model, decay)
    assert average is not None
    average.module.load_state_dict(model.state_dict())
    average.n_averaged.zero_()
    return average
