"""One typed description of a run, read from either kind of config. Configs end here."""

from .description import Experiment, TrainOptions, load_config, read_experiment

__all__ = ["Experiment", "TrainOptions", "load_config", "read_experiment"]
