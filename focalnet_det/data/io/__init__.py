"""Readers of what users bring: one per format, each checks every row and shows all faults."""
