"""Two-layer perceptron of a transformer-style block."""

from torch import Tensor, nn

from .checks import check_integer


class Mlp(nn.Module):
    """Linear, exact GELU, linear, with dropout after each activation.

    Args:
        dim: channels in and out.
        hidden_dim: channels in between.
        drop_rate: dropout probability.
    Raises: ValueError if there is no hidden channel.
    """

    def __init__(self, dim: int, hidden_dim: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        check_integer("hidden_dim", hidden_dim, 1, 2**20)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position on its own, (..., dim) -> (..., dim)."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
