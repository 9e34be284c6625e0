"""One typed description of a run, read from either kind of config. Configs end here."""

from .arguments import RunArguments
from .description import Experiment, describe, load_config, read_experiment, register_all
from .options import TrainOptions

__all__ = [
    "Experiment",
    "RunArguments",
    "TrainOptions",
    "describe",
    "load_config",
    "read_experiment",
    "register_all",
]
