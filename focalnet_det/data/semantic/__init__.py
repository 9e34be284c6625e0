"""Semantic segmentation data sets: label maps and their class lists."""
