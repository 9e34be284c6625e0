"""How to run; see focalnet_det.experiment.TrainOptions for every field."""

# For models that use every parameter in every step: processes need not look which they used, and
# send gradients in small parts while they make the rest.
STATIC_DDP = {"static_graph": True, "gradient_as_bucket_view": True, "bucket_cap_mb": 2}


def run_options(**changes):
    """All options with their defaults, and changes to them."""
    options = {
        "output_dir": "output",
        "init_checkpoint": "",
        "init_levels": "",
        "growth_iterations": 10_000,
        "device": "auto",
        "precision": "fp32",
        "recipe_batch": 0,
        "accumulation": 1,
        "clip_norm": 0.0,
        "clip_value": 0.0,
        "ema_decay": 0.0,
        "eval_period": 1.0,
        "checkpoint_period": 1.0,
        "period_unit": "epochs",
        "log_iterations": 20,
        "keep_checkpoints": 3,
        "keep_best": "",
        "profile": (),
        "wandb_project": "",
        "max_dets": 100,
        "pictures": 6,
        "report": False,
        "save_predictions": False,
        "boundary_ap": False,
        "seed": -1,
        "ddp": {},
    }
    unknown = set(changes) - set(options)
    if unknown:
        raise TypeError(f"Unknown run options: {', '.join(sorted(unknown))}.")
    return options | changes
