"""Reproduce mmdet's and mmseg's conventions where they differ from Detectron2's."""
