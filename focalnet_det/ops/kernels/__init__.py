"""Fused versions of the reference operators, one file each. Chosen in ``ops/dispatch.py``."""
