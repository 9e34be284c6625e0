"""Provide the heads, poolers and inference steps that Detectron2 lacks."""
