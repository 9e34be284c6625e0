"""One typed description of a run, read from either kind of config. Configs end here."""

from .arguments import RunArguments
from .check import check
from .description import (
    Experiment,
    describe,
    load_config,
    load_config_text,
    read_experiment,
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
    "register_all",
]
