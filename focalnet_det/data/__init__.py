"""Register, check, load and augment datasets."""
