"""Backends of deformable attention."""
