"""State-dict names and shapes of two variants at full size, written out by hand."""

import torch

from focalnet_det import create_backbone

Shapes = dict[str, tuple[int, ...]]


def actual(name: str) -> Shapes:
    with torch.device("meta"):
        return {key: tuple(t.shape) for key, t in create_backbone(name).state_dict().items()}


def network(
    widths: tuple[int, ...], depths: tuple[int, ...], *, stem: int, kernels: tuple[int, ...]
) -> Shapes:
    """Parts that every FocalNet has; ``stem`` is the side of its first kernel."""
    side = 2 if stem == 4 else 3
    shapes: Shapes = {
        "patch_embed.proj.weight": (widths[0], 3, stem, stem),
        "patch_embed.proj.bias": (widths[0],),
        "patch_embed.norm.weight": (widths[0],),
        "patch_embed.norm.bias": (widths[0],),
    }
    for i, (c, depth) in enumerate(zip(widths, depths, strict=True)):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}."
            gates = len(kernels) + 1
            shapes |= {
                block + "norm1.weight": (c,),
                block + "norm1.bias": (c,),
                block + "modulation.f.weight": (2 * c + gates, c),
                block + "modulation.f.bias": (2 * c + gates,),
                block + "modulation.h.weight": (c, c, 1, 1),
                block + "modulation.h.bias": (c,),
                block + "modulation.proj.weight": (c, c),
                block + "modulation.proj.bias": (c,),
                block + "norm2.weight": (c,),
                block + "norm2.bias": (c,),
                block + "mlp.fc1.weight": (4 * c, c),
                block + "mlp.fc1.bias": (4 * c,),
                block + "mlp.fc2.weight": (c, 4 * c),
                block + "mlp.fc2.bias": (c,),
            }
            for k, kernel in enumerate(kernels):
                shapes[block + f"modulation.focal_layers.{k}.0.weight"] = (c, 1, kernel, kernel)
        shapes |= {f"norm{i}.weight": (c,), f"norm{i}.bias": (c,)}
    for i, c in enumerate(widths[:-1]):
        shapes |= {
            f"layers.{i}.downsample.proj.weight": (2 * c, c, side, side),
            f"layers.{i}.downsample.proj.bias": (2 * c,),
            f"layers.{i}.downsample.norm.weight": (2 * c,),
            f"layers.{i}.downsample.norm.bias": (2 * c,),
        }
    return shapes


def test_tiny_srf() -> None:
    expected = network((96, 192, 384, 768), (2, 2, 6, 2), stem=4, kernels=(3, 5))
    assert actual("focalnet_tiny_srf") == expected


def test_huge_fl4() -> None:
    widths, depths = (352, 704, 1408, 2816), (2, 2, 18, 2)
    expected = network(widths, depths, stem=7, kernels=(3, 5, 7, 9))
    for i, (c, depth) in enumerate(zip(widths, depths, strict=True)):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}."
            expected |= {
                block + "gamma_1": (c,),
                block + "gamma_2": (c,),
                block + "modulation.ln.weight": (c,),
                block + "modulation.ln.bias": (c,),
            }
    assert actual("focalnet_huge_fl4") == expected
