"""Analyze the cost of backbones and the effect of batch padding."""

from .flops import BackboneCost, PartCost, analyze_backbone, component_parameters

__all__ = ["BackboneCost", "PartCost", "analyze_backbone", "component_parameters"]
