"""Building blocks against hand-worked numbers and NumPy."""

import math

import numpy as np
import pytest
import torch

from focalnet_det.layers import (
    DropPath,
    Mlp,
    PatchEmbed,
    channels_first,
    channels_last,
    layer_scale_parameter,
    pad_to_multiple,
    valid_mask,
)


def test_drop_path_drops_whole_samples_at_its_rate_and_rescales() -> None:
    samples, rate = 20_000, 0.3
    out = DropPath(rate).train()(torch.full((samples, 2, 3), 7.0))
    first = out[:, :1, :1]
    assert torch.equal(out, first.expand_as(out)), "a sample was dropped in part"
    kept = first.flatten() != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 7.0 / 0.7))
    # Five standard deviations of a binomial proportion.
    assert abs(kept.double().mean() - 0.7) < 5 * math.sqrt(0.3 * 0.7 / samples)


def test_drop_path_is_the_identity_in_eval_mode_and_at_rate_zero() -> None:
    x = torch.randn(64, 3)
    assert torch.equal(DropPath(0.9).eval()(x), x)
    assert torch.equal(DropPath(0.0).train()(x), x)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_drop_path_rejects_rates_outside_its_range(rate: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        DropPath(rate)


def test_mlp_equals_numpy() -> None:
    mlp = Mlp(3, 5).double()
    x = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    w = {name: value.numpy() for name, value in mlp.state_dict().items()}
    hidden = x.numpy() @ w["fc1.weight"].T + w["fc1.bias"]
    erf = np.vectorize(math.erf)
    hidden = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
    expected = hidden @ w["fc2.weight"].T + w["fc2.bias"]
    np.testing.assert_allclose(mlp(x).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_mlp_drops_out_in_training_only() -> None:
    mlp, x = Mlp(8, 32, drop_rate=0.5), torch.randn(4, 8)
    assert not torch.equal(mlp(x), mlp(x))
    assert torch.equal(mlp.eval()(x), mlp(x))


def test_layer_scale_is_a_parameter_or_absent() -> None:
    assert layer_scale_parameter(3, None) is None
    gamma = layer_scale_parameter(3, 1e-4)
    assert isinstance(gamma, torch.nn.Parameter)
    assert gamma.tolist() == pytest.approx([1e-4] * 3)


def test_memory_orders_are_views_and_undo_each_other() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert channels_last(x).shape == (2, 4, 5, 3)
    assert channels_last(x)[1, 2, 3, 0] == x[1, 0, 2, 3]
    assert torch.equal(channels_first(channels_last(x)), x)
    assert channels_last(x).data_ptr() == x.data_ptr()


def test_padding_is_zero_at_the_right_and_bottom() -> None:
    x = torch.arange(1.0, 16.0).reshape(1, 1, 3, 5)
    padded = pad_to_multiple(x, 4)[0, 0].tolist()
    assert padded == [
        [1, 2, 3, 4, 5, 0, 0, 0],
        [6, 7, 8, 9, 10, 0, 0, 0],
        [11, 12, 13, 14, 15, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert torch.equal(pad_to_multiple(x, 1), x)


def test_valid_mask_covers_the_cells_that_an_image_touches() -> None:
    like = torch.zeros(2, 7, 3, 4, dtype=torch.float64)
    mask = valid_mask([(9, 16), (8, 5)], 4, like)  # 2.25 x 4 and 2 x 1.25 cells
    assert mask.dtype == torch.float64
    assert mask[:, 0].tolist() == [
        [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]],
    ]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(8, 8)], "1 entries for a batch of 2"),
        ([(8, 8), (13, 8)], r"\(13, 8\) does not fit the batch"),
        ([(8, 17), (8, 8)], r"\(8, 17\) does not fit the batch"),
        ([(0, 8), (8, 8)], r"\(0, 8\) does not fit the batch"),
    ],
)
def test_valid_mask_rejects_sizes_that_do_not_fit(
    sizes: list[tuple[int, int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        valid_mask(sizes, 4, torch.zeros(2, 1, 3, 4))


@pytest.mark.parametrize(
    ("stride", "kernel", "padding"), [(4, None, 0), (4, 7, 2), (4, 7, 3), (2, None, 0), (2, 3, 1)]
)
@pytest.mark.parametrize(("height", "width"), [(8, 12), (9, 7), (5, 10)])
def test_patch_embedding_equals_loops(
    height: int, width: int, stride: int, kernel: int | None, padding: int
) -> None:
    embed = PatchEmbed(2, 3, stride=stride, overlap_kernel=kernel, overlap_padding=padding).double()
    torch.nn.init.normal_(embed.norm.weight)
    torch.nn.init.normal_(embed.norm.bias)
    x = torch.randn(2, 2, height, width, dtype=torch.float64)
    actual = embed(x).detach().numpy()

    size = kernel or stride
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)
    assert actual.shape == (2, rows, columns, 3)
    # Room for every tap: zeros before, and after the image up to the last window.
    canvas = np.zeros((2, 2, rows * stride + 2 * size, columns * stride + 2 * size))
    canvas[:, :, padding : padding + height, padding : padding + width] = x.numpy()
    w = {name: value.numpy() for name, value in embed.state_dict().items()}
    for i in range(rows):
        for j in range(columns):
            top, left = i * stride, j * stride
            patch = canvas[:, :, top : top + size, left : left + size]
            out = np.einsum("nchw,ochw->no", patch, w["proj.weight"]) + w["proj.bias"]
            out = (out - out.mean(1, keepdims=True)) / np.sqrt(out.var(1, keepdims=True) + 1e-5)
            out = out * w["norm.weight"] + w["norm.bias"]
            np.testing.assert_allclose(actual[:, i, j], out, rtol=1e-8, atol=1e-10)
