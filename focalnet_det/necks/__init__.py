"""Necks: what stands between a backbone and the heads."""
