"""Compute in the precision of a run."""

import contextlib
from typing import Any

import torch

from ..experiment import TrainOptions

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(options: TrainOptions) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast context of the options, a null context for fp32."""
    if options.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(options.device.split(":")[0], AUTOCAST_DTYPES[options.precision])
