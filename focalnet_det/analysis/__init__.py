"""What a backbone costs."""

from .flops import BackboneCost, PartCost, analyze_backbone, component_parameters

__all__ = ["BackboneCost", "PartCost", "analyze_backbone", "component_parameters"]
