"""Build the necks between backbones and heads."""
