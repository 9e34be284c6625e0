"""Define the corner pooling of RepPoints v2."""

from torch import Tensor, nn

from ...layers.conv_gn import GROUPS, conv_gn


def running_maximum(x: Tensor, dim: int, *, from_end: bool) -> Tensor:
    """Return the maximum over each position and those before it, same shape as x.

    Args:
        dim: dimension along which to go.
        from_end: over each position and those after it instead.
    """
    if from_end:
        return x.flip(dim).cummax(dim).values.flip(dim)
    return x.cummax(dim).values


class CornerPool(nn.Module):
    """Features of corners: maxima along the row and the column that a corner begins or ends.

    Args:
        channels: of input and output, divisible by 32.
        pooled_channels: of the maps that are pooled, divisible by 32.
        top_left: pool over what is below and right of a position; False for what is above and left.
    Source: arXiv:1808.01244, section 3.5; Scalsol/RepPointsV2:mmdet/ops/corner_pool.
    """

    def __init__(self, channels: int, pooled_channels: int, *, top_left: bool) -> None:
        super().__init__()
        self.top_left = top_left
        self.p1_conv1 = conv_gn(channels, pooled_channels)
        self.p2_conv1 = conv_gn(channels, pooled_channels)
        self.p_conv1 = nn.Conv2d(pooled_channels, channels, 3, padding=1, bias=False)
        self.p_gn1 = nn.GroupNorm(GROUPS, channels)
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.gn1 = nn.GroupNorm(GROUPS, channels)
        self.conv2 = conv_gn(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Pool features (N, C, H, W); return the same shape."""
        along_columns = running_maximum(self.p1_conv1(x), 2, from_end=self.top_left)
        along_rows = running_maximum(self.p2_conv1(x), 3, from_end=self.top_left)
        pooled = self.p_gn1(self.p_conv1(along_columns + along_rows))
        output: Tensor = self.conv2((pooled + self.gn1(self.conv1(x))).relu())
        return output
