"""Adapt the backbones to Detectron2: registry entries, FPN builders, LazyConfig."""
