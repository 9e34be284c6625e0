"""Optimizers."""

from detectron2.config import LazyCall as L

from focalnet_det.experiment.solver import adamw as build_adamw

# Swin's own recipe exempts its position biases too; the norm after its patches has no such name.
NO_DECAY_SWIN = ("norm", "relative_position_bias_table", "features.0.2.")

# Focal Transformer's own code names the same biases.
NO_DECAY_FOCAL = ("norm", "relative_position_bias_table")


def adamw(lr=1e-4, weight_decay=0.05, lr_factors=None, layer_decay=1.0, no_decay_names=("norm",)):
    """AdamW; parameters with `norm` in their name are exempt from decay, as published."""
    return L(build_adamw)(
        lr=lr,
        weight_decay=weight_decay,
        lr_factors=lr_factors or {},
        layer_decay=layer_decay,
        no_decay_names=no_decay_names,
    )
