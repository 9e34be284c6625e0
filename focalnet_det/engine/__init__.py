"""Train and evaluate experiments of either kind of config. Needs Detectron2."""

from ..compat import apply_shims

apply_shims()
