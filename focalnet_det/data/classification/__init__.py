"""Datasets of image labels, and of images without labels."""
