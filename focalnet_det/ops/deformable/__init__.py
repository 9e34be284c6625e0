"""Run backends of deformable attention."""
