"""Optimizers."""

from detectron2.config import LazyCall as L

from focalnet_det.experiment.solver import adamw as build_adamw

# Swin's own recipe exempts its position biases too; the norm after its patches has no such name.
NO_DECAY_SWIN = ("norm", "relative_position_bias_table", "features.0.2.")

# Focal Transformer's own code names the same biases.
NO_DECAY_FOCAL = ("norm", "relative_position_bias_table")


# Masked image modeling learns a token besides.
NO_DECAY_MATRICES = ("relative_position_bias_table", "mask_token")


def adamw(
    lr=1e-4,
    weight_decay=0.05,
    lr_factors=None,
    layer_decay=1.0,
    no_decay_names=("norm",),
    decay_vectors=True,
):
    """AdamW; parameters with `norm` in their name are exempt from decay, as published."""
    return L(build_adamw)(
        lr=lr,
        weight_decay=weight_decay,
        lr_factors=lr_factors or {},
        layer_decay=layer_decay,
        no_decay_names=no_decay_names,
        decay_vectors=decay_vectors,
    )


def adamw_matrices(lr, layer_decay=1.0):
    """AdamW as in classification: matrices and kernels alone are decayed."""
    return adamw(lr, layer_decay=layer_decay, no_decay_names=NO_DECAY_MATRICES, decay_vectors=False)
