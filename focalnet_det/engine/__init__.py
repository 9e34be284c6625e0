"""Training and evaluation, shared by both kinds of config. Needs Detectron2."""

from ..compat import apply_shims

apply_shims()
