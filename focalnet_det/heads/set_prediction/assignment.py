"""One-to-one assignment of predictions to the objects of an image."""

from collections.abc import Sequence

import torch
from detectron2.utils import comm
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# Numbers of predictions and, in the same order, of the objects they are assigned to.
Match = tuple[Tensor, Tensor]


def assign(costs: Sequence[Sequence[Tensor]], image_names: Sequence[str]) -> list[list[Match]]:
    """Find the assignments of least total cost, with one transfer from the device and one to it.

    Args:
        costs: for each layer of predictions, for each image: (queries, objects), float32.
        image_names: of the batch, for messages.
    Returns: for each layer, for each image: int64 numbers of queries, rising, and of objects, on
        the device of the costs; as many pairs as there are queries or objects, what is less.
    Raises: FloatingPointError that names the image if a cost is NaN or infinite.
    Source: arXiv:2005.12872, section 3.1; H. W. Kuhn, The Hungarian method, 1955.
    """
    flat = [cost for layer in costs for cost in layer]
    device = flat[0].device
    numbers = torch.cat([cost.flatten() for cost in flat]).cpu()
    matches, start = [], 0
    for i, cost in enumerate(flat):
        matrix = numbers[start : start + cost.numel()].view(cost.shape)
        start += cost.numel()
        if not matrix.isfinite().all():
            image = i % len(image_names)
            raise FloatingPointError(
                f"The matching cost of image {image_names[image]} (number {image} of the batch, "
                f"{cost.shape[1]} objects) is NaN or infinite at layer {i // len(image_names)} of "
                "the decoder: training has diverged, or the image or its masks hold NaN. Lower "
                "the learning rate, clip gradients, or check this image."
            )
        matches.append([torch.from_numpy(x) for x in linear_sum_assignment(matrix.numpy())])
    sizes = [len(queries) for queries, _ in matches]
    on_device = torch.stack([torch.cat(side) for side in zip(*matches, strict=True)]).to(device)
    pairs = [(part[0], part[1]) for part in on_device.split(sizes, dim=1)]
    images = len(image_names)
    return [pairs[i : i + images] for i in range(0, len(pairs), images)]


def mean_object_count(count: float, device: torch.device) -> Tensor:
    """Return a number or a sum over objects, averaged over all processes, at least 1; () float32.

    Every process must call this, also one whose batch has no object.
    """
    return mean_over_processes(torch.tensor(float(count), device=device)).clamp(min=1)


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of a value without gradient over all processes, each of which must call."""
    if comm.get_world_size() == 1:
        return value
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total / comm.get_world_size()
