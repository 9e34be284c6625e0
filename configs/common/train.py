"""How to run; see focalnet_det.experiment.TrainOptions for every field."""

from focalnet_det.experiment.options import default_options

# For models that use every parameter in every step: processes need not look which they used, and
# send gradients in small parts while they make the rest.
STATIC_DDP = {"static_graph": True, "gradient_as_bucket_view": True, "bucket_cap_mb": 2}


def run_options(**changes):
    """All options with their defaults, and changes to them."""
    options = default_options()
    unknown = set(changes) - set(options)
    if unknown:
        raise TypeError(f"Unknown run options: {', '.join(sorted(unknown))}.")
    return options | changes
