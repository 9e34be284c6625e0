"""Read a config of either kind into one typed description of a run."""

from .arguments import RunArguments
from .check import check
from .description import (
    Experiment,
    describe,
    load_config,
    load_config_text,
    read_experiment,
    recipe,
    register_all,
)
from .options import TrainOptions

__all__ = [
    "Experiment",
    "RunArguments",
    "TrainOptions",
    "check",
    "describe",
    "load_config",
    "load_config_text",
    "read_experiment",
    "recipe",
    "register_all",
]
