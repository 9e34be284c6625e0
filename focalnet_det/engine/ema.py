"""Maintain an exponential moving average of the weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


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
        share = 1 - min(decay, (1 + n) / (10 + n))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(list(averages), list(weights), share)
        else:
            torch._foreach_copy_(list(averages), list(weights))

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
