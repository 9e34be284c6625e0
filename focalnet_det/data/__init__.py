"""Data sets, mappers and augmentation."""
