"""Visualize data, predictions and training curves."""
