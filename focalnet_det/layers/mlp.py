"""Define the MLP of a transformer-style block."""

from torch import Tensor, nn

from .checks import check_integer


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, linear, with dropout after each of the two layers.

    Args:
        dim: input and output channels.
        hidden_dim: hidden channels.
        drop_rate: dropout probability.
    Raises: ValueError if ``hidden_dim`` is less than 1.
    """

    def __init__(self, dim: int, hidden_dim: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        check_integer("hidden_dim", hidden_dim, 1, 2**20)
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position independently, (..., dim) -> (..., dim)."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
