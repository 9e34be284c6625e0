"""Save and restore the random number generators of a process."""

import os
import random
from typing import Any

import numpy as np
import torch


def random_states(device: str) -> dict[str, Any]:
    """Return the states of the random number generators of this process."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        # Converted to lists, so that checkpoints load without unpickling arrays.
        "numpy": [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()],
        "torch": torch.get_rng_state(),
    }
    if device.startswith("cuda"):
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Any], device: str) -> None:
    """Restore the states returned by :func:`random_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if device.startswith("cuda") and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def make_deterministic() -> None:
    """Use deterministic operations only; PyTorch raises RuntimeError for others.

    Call it before the first GPU operation.

    Source: https://pytorch.org/docs/stable/notes/randomness.html.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
