"""Other numbers of focal levels, kernel sizes and image channels."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from focalnet_det import create_backbone
from focalnet_det.backbones import FocalNet
from focalnet_det.backbones.focalnet import FocalModulation
from focalnet_det.checkpoint import advance_global_level, load_pretrained
from focalnet_det.checkpoint.global_level import growing_modulations
from tests.helpers.compare import largest_error

# Grown from 2 to 3 and from 3 to 4 levels, with and without what distinguishes the families.
ROWS = [
    ("focalnet_tiny_srf", 2, 3),
    ("focalnet_tiny_lrf", 3, 4),
    ("focalnet_base_lrf", 3, 4),
    ("focalnet_large_fl3", 3, 4),
    ("focalnet_huge_fl3", 3, 4),
    ("focalnet_tiny_srf", 2, 4),
]
SMALL = {"embed_dim": 16, "depths": (2, 1, 2, 1), "drop_path_rate": 0.0}


def trained_like(name: str, levels: int, **changes: object) -> FocalNet:
    """Norms, gates and biases away from their initial values, as after training."""
    torch.manual_seed(1)
    net = create_backbone(name, **{**SMALL, "focal_levels": (levels,) * 4, **changes})
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if "gamma" in key:
                parameter.uniform_(0.1, 0.5)
            elif parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif ".focal_layers." in key:
                # As large as makes the means that the global context reads matter.
                parameter.normal_(0.05, 0.2)
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return net.eval()


def grown(
    name: str, old: int, new: int, mode: str, **changes: object
) -> tuple[FocalNet, FocalNet, Tensor, dict[str, Tensor]]:
    source = trained_like(name, old, **changes)
    arguments = {**SMALL, **changes, "focal_levels": (new,) * 4}
    net = create_backbone(name, **arguments)
    load_pretrained(net, source.state_dict(), levels=mode)
    x = torch.randn(2, 3, 70, 101)
    with torch.no_grad():
        return source, net.eval(), x, source(x)


@pytest.mark.parametrize(("name", "old", "new"), ROWS)
@torch.no_grad()
def test_preserving_growth_changes_nothing(name: str, old: int, new: int) -> None:
    _, net, x, expected = grown(name, old, new, "preserving")
    assert largest_error(net(x), expected) <= 1e-5
    # What is left is the order of summation.
    source, net, x = trained_like(name, old).double(), net.double(), x.double()
    assert largest_error(net(x), source(x)) <= 1e-12


@pytest.mark.parametrize("normalize", [False, True])
@torch.no_grad()
def test_preserving_growth_with_a_normalised_modulator(normalize: bool) -> None:
    """The sum is divided by the number of levels, which grows."""
    _, net, x, expected = grown(
        "focalnet_large_fl3", 3, 4, "preserving", normalize_modulator=normalize
    )
    assert largest_error(net(x), expected) <= 1e-5


@pytest.mark.parametrize(("name", "old", "new"), [ROWS[0], ROWS[3]])
@torch.no_grad()
def test_preserving_growth_with_larger_kernels_and_padding(name: str, old: int, new: int) -> None:
    source = trained_like(name, old, valid_context=True)
    net = create_backbone(
        name, **SMALL, focal_levels=(new,) * 4, focal_windows=(9, 7, 7, 5), valid_context=True
    ).eval()
    load_pretrained(net, source.state_dict(), levels="preserving")
    x, sizes = torch.randn(2, 3, 64, 96), [(64, 60), (33, 96)]
    assert largest_error(net(x, sizes), source(x, sizes)) <= 1e-5


@torch.no_grad()
def test_official_growth_changes_the_outputs() -> None:
    """What preserving growth is for: the new level feeds the global context (FACTS: 26-112 %)."""
    _, net, x, expected = grown("focalnet_tiny_srf", 2, 3, "official")
    assert largest_error(net(x), expected) > 0.02
    assert list(growing_modulations(net)) == []


@pytest.mark.parametrize(("name", "old", "new"), ROWS[:5])
def test_gradients_reach_the_new_level(name: str, old: int, new: int) -> None:
    """Gates first: their gradient needs the new context alone, the kernel's an open gate."""
    _, net, x, _ = grown(name, old, new, "preserving")
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    weights = {n: torch.randn_like(f) for n, f in net(x).items()}
    losses = []
    for step in range(3):
        loss = sum((feature * weights[n]).mean() for n, feature in net(x).items())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for modulation in (m for m in net.modules() if isinstance(m, FocalModulation)):
            row = 2 * modulation.dim + old
            assert modulation.f.weight.grad[row].abs().max() > 0
            kernel = modulation.focal_layers[old][0].weight
            assert (kernel.grad.abs().max() > 0) == (step > 0)
        optimizer.step()
    # Trainable, not only differentiable: small steps lower a linear loss, and nothing explodes.
    assert losses[2] < losses[1] < losses[0]
    assert losses[0] - losses[2] < 1


@torch.no_grad()
def test_the_global_context_moves_on_and_the_network_becomes_ordinary() -> None:
    _, net, x, expected = grown("focalnet_tiny_srf", 2, 3, "preserving")
    plain_names = create_backbone("focalnet_tiny_srf", **SMALL, focal_levels=(3,) * 4).state_dict()
    marker = "layers.0.blocks.0.modulation.global_level"
    assert net.state_dict()[marker] == 2
    errors = []
    for _ in range(4):
        advance_global_level(net, 0.25)
        errors.append(largest_error(net(x), expected))
    assert 0 < errors[0] < errors[1] < errors[2] < errors[3]
    assert list(growing_modulations(net)) == []
    assert net.state_dict().keys() == plain_names.keys()
    plain = create_backbone("focalnet_tiny_srf", **SMALL, focal_levels=(3,) * 4).eval()
    load_pretrained(plain, net.state_dict())
    assert largest_error(plain(x), net(x)) == 0
    with pytest.raises(ValueError, match="must not be negative"):
        advance_global_level(net, -1)


@torch.no_grad()
def test_a_file_of_a_growing_network_goes_on_growing() -> None:
    _, net, x, _ = grown("focalnet_tiny_srf", 2, 4, "preserving")
    advance_global_level(net, 1.25)
    again = create_backbone("focalnet_tiny_srf", **SMALL, focal_levels=(4,) * 4).eval()
    report = load_pretrained(again, copy.deepcopy(net.state_dict()))
    assert again.state_dict()["layers.1.blocks.0.modulation.global_level"] == 3.25
    assert largest_error(again(x), net(x)) == 0
    assert report.missing == []
    # An ordinary file would leave the growth as it is, and compute something else than saved.
    plain = trained_like("focalnet_tiny_srf", 4).state_dict()
    with pytest.raises(ValueError, match="global_level is not in the file"):
        load_pretrained(again, plain)
    assert load_pretrained(again, net.state_dict()).missing == []


def test_growing_modulation_by_hand() -> None:
    """One pixel, one channel, two levels: worked out with the error function."""
    from math import erf, sqrt

    from focalnet_det.checkpoint.global_level import set_global_level

    def gelu(v: float) -> float:
        return v * (1 + erf(v / sqrt(2))) / 2

    net = nn.Sequential(FocalModulation(1, focal_level=2, focal_window=1))
    set_global_level(net, "0", 1.25)
    (modulation,) = net
    f = modulation.f
    with torch.no_grad():
        # query, context, gates of level 1, level 2 and the global context
        f.weight.copy_(torch.tensor([[1.0], [2.0], [0.5], [-1.0], [3.0]]))
        f.bias.zero_()
        for layer, value in zip(modulation.focal_layers, (0.7, 1.5), strict=True):
            layer[0].weight.zero_()[..., layer[0].weight.shape[-1] // 2, :] = 0
            centre = layer[0].weight.shape[-1] // 2
            layer[0].weight[0, 0, centre, centre] = value
        modulation.h.weight.fill_(1)
        modulation.h.bias.zero_()
        modulation.proj.weight.fill_(1)
        modulation.proj.bias.zero_()
        out = float(modulation(torch.ones(1, 1, 1, 1)))
    first = gelu(0.7 * 2)
    second = gelu(1.5 * first)
    expected = 0.5 * first - second + 3 * gelu(0.75 * first + 0.25 * second)
    assert out == pytest.approx(expected, rel=1e-6)


# What is not growing.


def test_levels_are_refused_unless_asked_for() -> None:
    state = trained_like("focalnet_tiny_srf", 2).state_dict()
    more = create_backbone("focalnet_tiny_srf", **SMALL, focal_levels=(3,) * 4)
    with pytest.raises(ValueError, match=r"2 focal levels in the file, 3 .*levels=\"preserving\""):
        load_pretrained(more, state)
    fewer = create_backbone("focalnet_tiny_srf", **SMALL, focal_levels=(1,) * 4)
    with pytest.raises(ValueError, match=r"levels=\"shrink\" drops"):
        load_pretrained(fewer, state)
    with pytest.raises(ValueError, match="does not support"):
        load_pretrained(fewer, state, levels="preserving")
    with pytest.raises(ValueError, match="levels must be None or one of"):
        load_pretrained(fewer, state, levels="bigger")
    small = create_backbone(
        "focalnet_tiny_srf", **SMALL, focal_levels=(3,) * 4, focal_windows=(1,) * 4
    )
    with pytest.raises(ValueError, match="cannot crop"):
        load_pretrained(small, state, levels="preserving")
    assert list(growing_modulations(small)) == []


def test_official_growth_by_index_and_by_kernel() -> None:
    """Rows of f: query and context, a gate per level, the global gate (arXiv:2203.11926, eq. 5)."""
    source = trained_like("focalnet_large_fl3", 3).state_dict()
    name, kernel = (
        "layers.0.blocks.0.modulation.f.bias",
        "layers.0.blocks.0.modulation.focal_layers",
    )
    old = source[name]
    for mode, window, sources in (
        ("official", 5, [0, 1, 2, None]),
        ("by_kernel", 3, [None, 0, 1, 2]),
    ):
        net = create_backbone(
            "focalnet_large_fl3", **SMALL, focal_levels=(4,) * 4, focal_windows=(window,) * 4
        )
        fresh = {n: t.clone() for n, t in net.state_dict().items()}
        report = load_pretrained(net, source, levels=mode)
        new = net.state_dict()
        assert torch.equal(new[name][:32], old[:32])
        assert new[name][-1] == old[-1]
        for k, origin in enumerate(sources):
            gate, weight = new[name][32 + k], new[f"{kernel}.{k}.0.weight"]
            if origin is None:
                assert gate == 0
                assert torch.equal(weight, fresh[f"{kernel}.{k}.0.weight"])
                assert f"{kernel}.{k}.0.weight" in report.missing
            else:
                assert gate == old[32 + origin]
                assert torch.equal(weight, source[f"{kernel}.{origin}.0.weight"])


@torch.no_grad()
def test_shrinking_measures_what_it_changes() -> None:
    source = trained_like("focalnet_tiny_lrf", 3)
    net = create_backbone("focalnet_tiny_srf", **SMALL, output_norm=False).eval()
    report = load_pretrained(net, source.state_dict(), levels="shrink")
    note = next(n for n in report.notes if "Fewer focal levels" in n)
    printed = [float(v) for v in re.findall(r"stage\d (\d+\.\d) %", note)]
    # The same, with the source's own class and by hand.
    plain = create_backbone(
        "focalnet_tiny_lrf", **SMALL, output_norm=False, weights=source.state_dict()
    ).eval()
    x = torch.randn(1, 1, 96, 96, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    for value, name in zip(printed, net(x), strict=True):
        change = (net(x)[name] - plain(x)[name]).norm() / plain(x)[name].norm()
        assert value == pytest.approx(100 * float(change), abs=0.06)
        assert value > 1
    assert note in str(report)


@pytest.mark.parametrize("windows", [(9, 9, 9, 9), (11, 9, 9, 7)])
@torch.no_grad()
def test_kernel_growth_is_exact(windows: tuple[int, ...]) -> None:
    """3 -> 9 and 3 -> 11, as detectors have them."""
    source = trained_like("focalnet_tiny_lrf", 3).double()
    net = create_backbone("focalnet_tiny_lrf", **SMALL, focal_windows=windows)
    load_pretrained(net, {n: t.float() for n, t in source.state_dict().items()})
    x = torch.randn(1, 3, 97, 131, dtype=torch.float64)
    assert largest_error(net.double().eval()(x), source(x)) <= 1e-6


@torch.no_grad()
def test_other_image_channels() -> None:
    source = trained_like("focalnet_tiny_srf", 2)
    state, x = source.state_dict(), torch.randn(1, 3, 64, 64)
    five = create_backbone("focalnet_tiny_srf", **SMALL, in_channels=5).eval()
    report = load_pretrained(five, state)
    assert report.resized == ["patch_embed.proj.weight"]
    extra = torch.randn(1, 2, 64, 64)
    assert largest_error(five(torch.cat([x, extra], 1)), source(x)) <= 1e-6
    grey = create_backbone("focalnet_tiny_srf", **SMALL, in_channels=1).eval()
    load_pretrained(grey, state)
    assert largest_error(grey(x[:, :1]), source(x[:, :1].expand(-1, 3, -1, -1))) <= 1e-5
    with pytest.raises(ValueError, match="resizing is off"):
        load_pretrained(grey, state, allow_inflation=False)
