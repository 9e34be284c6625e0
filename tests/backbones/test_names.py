"""State-dict names and shapes of two variants at full size, written out by hand."""

import torch

from focalnet_det import create_backbone

Shapes = dict[str, tuple[int, ...]]


def actual(name: str) -> Shapes:
    with torch.device("meta"):
        return {key: tuple(t.shape) for key, t in create_backbone(name).state_dict().items()}


def test_tiny_srf() -> None:
    expected: Shapes = {
        "patch_embed.proj.weight": (96, 3, 4, 4),
        "patch_embed.proj.bias": (96,),
        "patch_embed.norm.weight": (96,),
        "patch_embed.norm.bias": (96,),
    }
    for i, (c, depth) in enumerate(((96, 2), (192, 2), (384, 6), (768, 2))):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}."
            expected |= {
                block + "norm1.weight": (c,),
                block + "norm1.bias": (c,),
                block + "modulation.f.weight": (2 * c + 3, c),
                block + "modulation.f.bias": (2 * c + 3,),
                block + "modulation.h.weight": (c, c, 1, 1),
                block + "modulation.h.bias": (c,),
                block + "modulation.focal_layers.0.0.weight": (c, 1, 3, 3),
                block + "modulation.focal_layers.1.0.weight": (c, 1, 5, 5),
                block + "modulation.proj.weight": (c, c),
                block + "modulation.proj.bias": (c,),
                block + "norm2.weight": (c,),
                block + "norm2.bias": (c,),
                block + "mlp.fc1.weight": (4 * c, c),
                block + "mlp.fc1.bias": (4 * c,),
                block + "mlp.fc2.weight": (c, 4 * c),
                block + "mlp.fc2.bias": (c,),
            }
        expected |= {f"norm{i}.weight": (c,), f"norm{i}.bias": (c,)}
    for i, c in enumerate((96, 192, 384)):
        expected |= {
            f"layers.{i}.downsample.proj.weight": (2 * c, c, 2, 2),
            f"layers.{i}.downsample.proj.bias": (2 * c,),
            f"layers.{i}.downsample.norm.weight": (2 * c,),
            f"layers.{i}.downsample.norm.bias": (2 * c,),
        }
    assert actual("focalnet_tiny_srf") == expected


def test_huge_fl4() -> None:
    expected: Shapes = {
        "patch_embed.proj.weight": (352, 3, 7, 7),
        "patch_embed.proj.bias": (352,),
        "patch_embed.norm.weight": (352,),
        "patch_embed.norm.bias": (352,),
    }
    for i, (c, depth) in enumerate(((352, 2), (704, 2), (1408, 18), (2816, 2))):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}."
            expected |= {
                block + "gamma_1": (c,),
                block + "gamma_2": (c,),
                block + "norm1.weight": (c,),
                block + "norm1.bias": (c,),
                block + "modulation.f.weight": (2 * c + 5, c),
                block + "modulation.f.bias": (2 * c + 5,),
                block + "modulation.h.weight": (c, c, 1, 1),
                block + "modulation.h.bias": (c,),
                block + "modulation.focal_layers.0.0.weight": (c, 1, 3, 3),
                block + "modulation.focal_layers.1.0.weight": (c, 1, 5, 5),
                block + "modulation.focal_layers.2.0.weight": (c, 1, 7, 7),
                block + "modulation.focal_layers.3.0.weight": (c, 1, 9, 9),
                block + "modulation.ln.weight": (c,),
                block + "modulation.ln.bias": (c,),
                block + "modulation.proj.weight": (c, c),
                block + "modulation.proj.bias": (c,),
                block + "norm2.weight": (c,),
                block + "norm2.bias": (c,),
                block + "mlp.fc1.weight": (4 * c, c),
                block + "mlp.fc1.bias": (4 * c,),
                block + "mlp.fc2.weight": (c, 4 * c),
                block + "mlp.fc2.bias": (c,),
            }
        expected |= {f"norm{i}.weight": (c,), f"norm{i}.bias": (c,)}
    for i, c in enumerate((352, 704, 1408)):
        expected |= {
            f"layers.{i}.downsample.proj.weight": (2 * c, c, 3, 3),
            f"layers.{i}.downsample.proj.bias": (2 * c,),
            f"layers.{i}.downsample.norm.weight": (2 * c,),
            f"layers.{i}.downsample.norm.bias": (2 * c,),
        }
    assert actual("focalnet_huge_fl4") == expected
