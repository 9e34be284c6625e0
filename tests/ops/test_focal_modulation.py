"""Focal modulation against explicit NumPy loops that share no code with torch."""

import math

import numpy as np
import pytest
import torch

from focalnet_det.backbones.focalnet import FocalModulation
from focalnet_det.ops import aggregate_contexts

gelu = np.vectorize(lambda v: 0.5 * v * (1.0 + math.erf(v / math.sqrt(2.0))), otypes=[float])


def depthwise(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Same-size depthwise cross-correlation of (C, H, W) with (C, k, k), zeros outside."""
    channels, height, width = image.shape
    radius = kernel.shape[-1] // 2
    out = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            for dy in range(-radius, radius + 1):
                for dx in range(-radius, radius + 1):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        tap = kernel[:, dy + radius, dx + radius]
                        out[:, y, x] += image[:, y + dy, x + dx] * tap
    assert channels == kernel.shape[0]
    return out


def aggregate(
    context: np.ndarray, gates: np.ndarray, kernels: list[np.ndarray], normalize: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Result for one image, (C, H, W), and its global context, (C,)."""
    total = np.zeros_like(context)
    for level, kernel in enumerate(kernels):
        context = gelu(depthwise(context, kernel))
        total += context * gates[level]
    global_context = gelu(context.mean(axis=(1, 2)))
    total += global_context[:, None, None] * gates[len(kernels)]
    return (total / (len(kernels) + 1) if normalize else total), global_context


def random_inputs(
    levels: int, window: int, shape: tuple[int, int, int, int] = (2, 3, 5, 6)
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    n, c, h, w = shape
    context = torch.randn(n, c, h, w, dtype=torch.float64)
    gates = torch.randn(n, levels + 1, h, w, dtype=torch.float64)
    kernels = [
        torch.randn(c, 1, k, k, dtype=torch.float64) / k
        for k in range(window, window + 2 * levels, 2)
    ]
    return context, gates, kernels


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("window", [1, 3, 5, 7])
@pytest.mark.parametrize("levels", [0, 1, 2, 3, 4])
def test_aggregation_equals_loops(levels: int, window: int, normalize: bool) -> None:
    context, gates, kernels = random_inputs(levels, window)
    actual = aggregate_contexts(context, gates, kernels, normalize=normalize)
    for i in range(len(context)):
        taps = [kernel[:, 0].numpy() for kernel in kernels]
        expected, _ = aggregate(context[i].numpy(), gates[i].numpy(), taps, normalize)
        np.testing.assert_allclose(actual[i].numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("levels", [0, 1, 3])
def test_valid_mask_equals_loops_over_the_cropped_image(levels: int, normalize: bool) -> None:
    context, gates, kernels = random_inputs(levels, 3, (3, 2, 6, 7))
    areas = [(6, 7), (4, 7), (2, 3)]
    valid = torch.zeros(3, 1, 6, 7, dtype=torch.float64)
    for mask, (h, w) in zip(valid, areas, strict=True):
        mask[:, :h, :w] = 1
    actual = aggregate_contexts(context, gates, kernels, normalize=normalize, valid=valid).numpy()
    for i, (h, w) in enumerate(areas):
        taps = [kernel[:, 0].numpy() for kernel in kernels]
        gate = gates[i].numpy()
        expected, global_context = aggregate(
            context[i, :, :h, :w].numpy(), gate[:, :h, :w], taps, normalize
        )
        np.testing.assert_allclose(actual[i, :, :h, :w], expected, rtol=1e-10, atol=1e-12)
        # Outside the image only the global context is left.
        outside = global_context[:, None, None] * gate[levels] / (levels + 1 if normalize else 1)
        outside[:, :h, :w] = actual[i, :, :h, :w]
        np.testing.assert_allclose(actual[i], outside, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("levels", [0, 2])
def test_gradients(levels: int, masked: bool) -> None:
    context, gates, kernels = random_inputs(levels, 3, (2, 2, 3, 4))
    valid = torch.ones(2, 1, 3, 4, dtype=torch.float64)
    valid[1, :, 2:] = 0
    tensors = [tensor.requires_grad_() for tensor in (context, gates, *kernels)]

    def function(context: torch.Tensor, gates: torch.Tensor, *kernels: torch.Tensor):
        return aggregate_contexts(
            context, gates, kernels, normalize=True, valid=valid if masked else None
        )

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("gate_count", [1, 2, 4])
def test_wrong_number_of_gates_is_an_error(gate_count: int) -> None:
    context, _, kernels = random_inputs(2, 3)
    with pytest.raises(ValueError, match=f"2 focal levels need 3 gates.* got {gate_count}\\."):
        aggregate_contexts(context, torch.ones(2, gate_count, 5, 6).double(), kernels)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("levels", "window"), [(0, 3), (2, 3), (3, 5), (4, 3)])
def test_module_equals_numpy(levels: int, window: int, normalize: bool, post_norm: bool) -> None:
    dim = 4
    module = FocalModulation(
        dim,
        focal_level=levels,
        focal_window=window,
        normalize_modulator=normalize,
        post_norm=post_norm,
    ).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 5, 6, dim, dtype=torch.float64)
    actual = module(x).detach().numpy()

    weights = {name: value.numpy() for name, value in module.state_dict().items()}
    assert ("ln.weight" in weights) == post_norm
    projected = x.numpy() @ weights["f.weight"].T + weights["f.bias"]
    query, context, gates = np.split(projected, [dim, 2 * dim], axis=-1)
    kernels = [weights[f"focal_layers.{level}.0.weight"][:, 0] for level in range(levels)]
    assert [kernel.shape[-1] for kernel in kernels] == [window + 2 * k for k in range(levels)]
    for i in range(2):
        aggregated, _ = aggregate(
            context[i].transpose(2, 0, 1), gates[i].transpose(2, 0, 1), kernels, normalize
        )
        modulator = aggregated.transpose(1, 2, 0) @ weights["h.weight"][:, :, 0, 0].T
        modulated = query[i] * (modulator + weights["h.bias"])
        if post_norm:
            modulated = layer_norm(modulated, weights["ln.weight"], weights["ln.bias"])
        expected = modulated @ weights["proj.weight"].T + weights["proj.bias"]
        np.testing.assert_allclose(actual[i], expected, rtol=1e-9, atol=1e-11)
