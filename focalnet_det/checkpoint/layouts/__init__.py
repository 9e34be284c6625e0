"""Translate the parameter names of public checkpoints, with one table of rows per layout."""
