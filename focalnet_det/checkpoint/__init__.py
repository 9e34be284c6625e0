"""Read, inspect, convert and load weights, published ones and those saved by this package."""

from .convert import Conversion, convert_checkpoint, convert_state_dict
from .files import Checkpoint, check_file, read_checkpoint, read_state_dict, write_state_dict
from .global_level import advance_global_level
from .headed import load_headed, load_initial_weights
from .inspect import Inspection, inspect_checkpoint
from .layouts.tables import LAYOUTS
from .load import load_pretrained
from .load_report import LoadReport
from .zoo import WEIGHTS, list_weights

__all__ = [
    "LAYOUTS",
    "WEIGHTS",
    "Checkpoint",
    "Conversion",
    "Inspection",
    "LoadReport",
    "advance_global_level",
    "check_file",
    "convert_checkpoint",
    "convert_state_dict",
    "inspect_checkpoint",
    "list_weights",
    "load_headed",
    "load_initial_weights",
    "load_pretrained",
    "read_checkpoint",
    "read_state_dict",
    "write_state_dict",
]
