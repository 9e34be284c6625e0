"""Build convolutions with group norm."""

from collections import OrderedDict

from torch import nn

GROUPS = 32


def conv_gn(
    in_channels: int, out_channels: int, kernel_size: int = 3, *, relu: bool = True
) -> nn.Sequential:
    """Build a convolution without bias, a group norm and a ReLU.

    The submodules have the names of mmcv's ``ConvModule``: ``conv`` and ``gn``.

    Args:
        out_channels: divisible by 32.
        kernel_size: odd; the size of the map does not change.
        relu: False for none.
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv=conv, gn=nn.GroupNorm(GROUPS, out_channels)
    )
    if relu:
        parts["relu"] = nn.ReLU(inplace=True)
    return nn.Sequential(parts)
