"""Focal attention of both versions against slow loops, in values and in every gradient."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from focalnet_det.backbones.attention import (
    FocalAttention,
    NearestAttention,
    WindowAttention,
)
from focalnet_det.ops import nearest, window_attention
from focalnet_det.ops.focal_block import policy
from focalnet_det.ops.window_attention import WindowGrid
from focalnet_det.ops.window_layout import neighbor_cells, ring
from tests.helpers.focal_loops import closest, loop_v1, loop_v2, neighbor_list

# Version, pooled square, map: multiples of a window and not, one window, small and narrow maps.
CASES = [(1, 3, size) for size in ((14, 14), (8, 9), (7, 7), (5, 4), (3, 20))]
CASES += [(1, focal_window, (8, 9)) for focal_window in (1, 7)]
CASES += [(2, 0, size) for size in ((14, 14), (8, 15), (5, 4), (3, 20))]


def attention(version: int, focal_window: int = 3, top_k: int = 40) -> WindowAttention:
    torch.manual_seed(0)
    module: WindowAttention
    if version == 1:
        module = FocalAttention(
            6, num_heads=2, window_size=7, expand_size=3, focal_window=focal_window
        )
    else:
        module = NearestAttention(6, num_heads=2, window_size=7, top_k=top_k)
    for name, parameter in module.named_parameters():
        # Tables of a size that shows where a column is permuted.
        nn.init.normal_(parameter, std=1.0 if "table" in name else 0.4)
    return module.double()


def pool_layer() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(49, 1).double()


def results(
    run: Callable[[nn.Module, Tensor, nn.Linear], Tensor], module: WindowAttention, x: Tensor
) -> dict[str, Tensor]:
    """Output and all gradients, of the input and of the pool too."""
    module, pool = copy.deepcopy(module), pool_layer()
    x = x.clone().requires_grad_()
    out = run(module, x, pool)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    (out * weights).sum().backward()
    found = {"out": out.detach(), "x": x.grad}
    for prefix, owner in (("", module), ("pool.", pool)):
        found |= {f"{prefix}{name}": p.grad for name, p in owner.named_parameters()}
    return {name: torch.zeros(()) if g is None else g for name, g in found.items()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-6)
        other = actual[name].expand(value.shape) if value.ndim else actual[name]
        assert float((other - value).abs().max()) <= 1e-9 * scale + 1e-12, name


def tokens_of(size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(1, *size, 6, dtype=torch.float64, generator=generator)


@functools.cache
def slow(version: int, focal_window: int, size: tuple[int, int]) -> dict[str, Tensor]:
    loop = loop_v1 if version == 1 else loop_v2
    module = attention(version, focal_window)
    return results(lambda m, x, pool: loop(m, x[0], pool)[None], module, tokens_of(size))


@pytest.mark.parametrize("path", [None, "reference"])
@pytest.mark.parametrize(("version", "focal_window", "size"), CASES, ids=str)
def test_equals_a_slow_loop(
    version: int, focal_window: int, size: tuple[int, int], path: str | None
) -> None:
    def run(m: nn.Module, x: Tensor, pool: nn.Linear) -> Tensor:
        with policy.force_backend(path):
            return m(x, pool)

    actual = results(run, attention(version, focal_window), tokens_of(size))
    assert_equal(actual, slow(version, focal_window, size))


@pytest.mark.parametrize("version", [1, 2])
def test_batches_and_chunks_change_nothing(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of a batch, and windows that are computed a few at a time."""
    module = attention(version, 5)
    x = torch.randn(3, 30, 37, 6, dtype=torch.float64)
    together = results(lambda m, i, p: m(i, p), module, x)
    monkeypatch.setattr(window_attention, "CHUNK", 2 * 49 * 40 * 2)
    apart = results(lambda m, i, p: torch.cat([m(one[None], p) for one in i]), module, x)
    assert_equal(apart, together)


@pytest.mark.parametrize("version", [1, 2])
def test_gradients_pass_gradcheck(version: int) -> None:
    module, pool = attention(version), pool_layer()
    x = torch.randn(2, 8, 8, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: module(t, pool)[:, ::3, ::5], x, fast_mode=True)


def test_twelve_tokens_of_the_ring_are_read_twice() -> None:
    """Those in the middle of each side; the table's columns are in the published order."""
    expected: dict[tuple[int, int], list[int]] = {}
    for column, row, position in neighbor_list():
        expected.setdefault((row, position), []).append(column)
    found = ring(7, 3)
    assert len(found.offsets) == len(expected) == 120
    assert len(found.second) == 12
    twice = {place for place in expected if len(expected[place]) == 2}
    assert twice == {(r, 3) for r in (-3, -2, -1, 7, 8, 9)} | {
        (3, c) for c in (-3, -2, -1, 7, 8, 9)
    }
    for k, (place, column) in enumerate(zip(found.offsets, found.columns, strict=True)):
        columns = [column] + ([found.second[k - 108]] if k >= 108 else [])
        assert columns == expected[place]
    assert [len(cells) for _, cells in neighbor_cells(7, 3)] == [33] * 4


@pytest.mark.parametrize("size", [(9, 16), (14, 14), (3, 50), (60, 2), (1, 1), (40, 45)], ids=str)
@pytest.mark.parametrize("count", [1, 10, 128])
def test_nearest_sets_are_the_closest_tokens(size: tuple[int, int], count: int) -> None:
    height, width = size
    layout = WindowGrid(height, width, 7)
    tokens, windows = nearest.nearest_sets(layout, count)
    assert tokens.shape == (layout.windows, min(count, height * width))
    for number in range(layout.windows):
        i, j = divmod(number, layout.columns)
        expected = closest(7 * i + 3, 7 * j + 3, height, width, count)
        assert tokens[number].tolist() == [y * width + x for y, x in expected]
        expected = closest(i, j, layout.rows, layout.columns, count)
        assert windows[number].tolist() == [y * layout.columns + x for y, x in expected]


def test_stored_sets_are_used_on_their_size_alone() -> None:
    size = WindowGrid(14, 28, 7)
    tokens, windows = nearest.nearest_sets(size, 40)
    # Another choice among tokens equally far away: the last of the set for one that is left out.
    far = [((y - 3) ** 2 + (x - 3) ** 2, y * 28 + x) for y in range(14) for x in range(28)]
    border = sorted(far)[39][0]
    left_out = [n for d, n in far if d == border and n not in tokens[0].tolist()]
    assert left_out, "no tie at the border of the set"
    changed = tokens.clone()
    changed[0, 39] = left_out[0]
    module, plain = attention(2), attention(2)
    assert module.store_sets((changed, windows))
    x = torch.randn(1, 14, 28, 6, dtype=torch.float64)
    for path in (None, "reference"):
        with policy.force_backend(path), torch.no_grad():
            difference = (module(x, pool_layer()) - plain(x, pool_layer())).abs().amax((0, 3))
            # The first window reads another token, and no other window does.
            assert difference[:7, :7].min() > 1e-6
            assert max(difference[:, 7:].max(), difference[7:].max()) < 1e-12
            other = x[:, :, :27]
            assert torch.equal(module(other, pool_layer()), plain(other, pool_layer()))


def test_sets_of_no_map_are_refused() -> None:
    tokens, windows = nearest.nearest_sets(WindowGrid(14, 14, 7), 40)
    module = attention(2)
    wrong = tokens.clone()
    wrong[0, 0] = 14 * 14 - 1
    twice = tokens.clone()
    twice[0, 0] = twice[0, 1]
    for sets in (
        (wrong, windows),
        (twice, windows),
        (tokens + 196, windows),
        (tokens[:3], windows),
    ):
        assert not module.store_sets(sets)
    assert module.topk_cloest_indice_0 is None


def test_sets_stay_with_the_weights() -> None:
    module, other = attention(2), attention(2)
    sets = nearest.nearest_sets(WindowGrid(14, 14, 7), 40)
    assert module.store_sets(sets)
    state = module.state_dict()
    assert set(state) - set(other.state_dict()) == {f"topk_cloest_indice_{k}" for k in (0, 1)}
    other.load_state_dict(state)
    assert other._stored is module._stored, "blocks with the same sets share a plan"


def test_unread_neighbors_get_a_gradient_of_zero() -> None:
    """On maps of one window: DistributedDataParallel refuses parameters without any."""
    module = attention(1)
    module(torch.randn(1, 6, 30, 6, dtype=torch.float64), pool_layer()).sum().backward()
    gradient = module.relative_position_bias_table_to_neighbors.grad
    assert gradient is not None
    assert not gradient.any()


@pytest.mark.parametrize("version", [1, 2])
def test_adapters_around_the_projection_are_called(version: int) -> None:
    module = attention(version)
    x = torch.randn(1, 9, 9, 6, dtype=torch.float64)
    expected = module(x, pool_layer())
    seen: list[int] = []
    module.qkv.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(module(x, pool_layer()), expected)
    assert seen
