"""Heads: what Detectron2 lacks."""
