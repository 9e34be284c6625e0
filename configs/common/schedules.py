"""Learning-rate schedules."""

from detectron2.config import LazyCall as L

from focalnet_det.experiment.solver import Schedule

# Epochs and the epochs after which the rate drops by 10: the first two as published for FocalNet
# ("3x" is 36 epochs), the last as Detectron2 has it with large-scale jitter.
MULTISTEP = {"1x": (12, (9, 11)), "3x": (36, (27, 33)), "100ep": (100, (88.9, 96.3))}


def multistep(name):
    """A row of the table, in epochs of the real training set, whatever its size and the batch."""
    epochs, milestones = MULTISTEP[name]
    return L(Schedule)(
        epochs=epochs,
        iterations=None,
        decay="multistep",
        milestones=milestones,
        warmup_iterations=500,
        warmup_factor=0.001,
    )


def cosine(iterations, warmup_iterations=100):
    """Linear warmup, then cosine to zero."""
    return L(Schedule)(
        epochs=None,
        iterations=iterations,
        decay="cosine",
        warmup_iterations=warmup_iterations,
        warmup_factor=0.001,
    )


def poly(iterations=160_000, warmup_iterations=1500, warmup_factor=1e-6, power=1.0):
    """Linear warmup, then to zero, linearly with power 1, as published for UPerNet on ADE20K."""
    return L(Schedule)(
        epochs=None,
        iterations=iterations,
        decay="poly",
        warmup_iterations=warmup_iterations,
        warmup_factor=warmup_factor,
        power=power,
    )


def multistep_iterations(iterations, milestones):
    """Iterations and those after which the rate drops by 10; no warmup, as Mask2Former and DINO."""
    return L(Schedule)(
        epochs=None,
        iterations=iterations,
        decay="multistep",
        milestones=milestones,
        warmup_iterations=0,
        warmup_factor=1.0,
    )


def cosine_epochs(epochs, *, warmup_iterations, warmup_factor=0.001, final_factor=0.01):
    """Linear warmup, then cosine to a share of the rate, as published for classification."""
    return L(Schedule)(
        epochs=epochs,
        iterations=None,
        decay="cosine",
        warmup_iterations=warmup_iterations,
        warmup_factor=warmup_factor,
        final_factor=final_factor,
    )
