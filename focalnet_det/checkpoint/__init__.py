"""Reading and loading of published and own weights."""

from .load import LoadReport, load_initial_weights, load_pretrained, read_state_dict

__all__ = ["LoadReport", "load_initial_weights", "load_pretrained", "read_state_dict"]
