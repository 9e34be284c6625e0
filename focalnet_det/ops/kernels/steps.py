"""Parts of a branch in training that are no matrix products, as plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import depthwise
from .tiles import rows, tiles

aten = torch.ops.aten


class Steps:
    """Maps are (N, H, W, C), contiguous, of one type; ``valid`` is (N, H, W, 1) or None."""

    def level(self, context: Tensor, kernel: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next level before and after its GELU; the latter zero outside the image."""
        before = depthwise.depthwise(context, kernel)
        return before, self.gelu(before, valid)

    def gelu(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """GELU, zero outside the image; any shape without ``valid``."""
        after = F.gelu(x)
        return after if valid is None else after.mul_(valid)

    def gelu_pair_(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """GELU; the gradient by it, contiguous, becomes that by ``x``.

        Returns: the GELU, and the sum of the gradient by ``x`` over all but the channels.
        """
        aten.gelu_backward.grad_input(gradient, x, grad_input=gradient)
        return F.gelu(x), rows(gradient).sum(0)

    def gated_sum(self, contexts: list[Tensor], gates: Tensor, shared: Tensor) -> Tensor:
        """Sum of the contexts, each times its gate.

        Args:
            contexts: of the levels, (N, P, C) each.
            gates: (N, P, L + 1).
            shared: the global one, (N, 1, C).
        Returns: (N, P, C).
        """
        total = gates[..., -1:] * shared
        for level, context in enumerate(contexts):
            total += context * gates[..., level : level + 1]
        return total

    def gates_gradient(self, by_sum: Tensor, contexts: list[Tensor], shared: Tensor) -> Tensor:
        """Gradient by ``gates`` of :meth:`gated_sum`, from that by its result."""
        parts = [(by_sum * context).sum(-1) for context in contexts]
        return torch.stack([*parts, (by_sum @ shared.mT).squeeze(-1)], dim=-1)

    def level_backward(
        self,
        by_aggregated: Tensor,
        gates: Tensor,
        by_after: Tensor,
        before: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        """Gradient by a level before its GELU.

        Args:
            by_aggregated: by the gated sum.
            gates: (N, H, W), of this level.
            by_after: by the level after its GELU through what follows from it; any strides.
            before: the level.
            valid: see the class.
        Returns: (N, H, W, C).
        """
        out = torch.empty_like(before)
        shape = before.shape[0], -1, before.shape[-1]
        flat, after, first = out.view(shape), by_after.reshape(shape), before.view(shape)
        for tile in tiles(flat):
            by_tile = by_aggregated.view(shape)[tile] * gates.flatten(1)[tile][..., None]
            by_tile += after[tile]
            if valid is not None:
                by_tile *= valid.flatten(1)[tile][..., None]
            aten.gelu_backward.grad_input(by_tile, first[tile], grad_input=flat[tile])
        return out

    def depthwise_input_gradient(self, gradient: Tensor, kernel: Tensor) -> Tensor:
        """See :mod:`focalnet_det.ops.kernels.depthwise`."""
        return depthwise.depthwise_input_gradient(gradient, kernel)

    def depthwise_weight_gradient(self, x: Tensor, gradient: Tensor, size: int) -> Tensor:
        """See :mod:`focalnet_det.ops.kernels.depthwise`."""
        return depthwise.depthwise_weight_gradient(x, gradient, size)
