"""Panoptic data sets: COCO's format, and what is derived from it."""
