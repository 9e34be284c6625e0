"""Compute parts of a branch in training in plain PyTorch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights import Affine
from . import depthwise
from .tiles import rows, tiles

aten = torch.ops.aten


class Steps:
    """Maps are (N, H, W, C), contiguous, of one type; ``valid`` is (N, H, W, 1) or None."""

    def norm(self, x: Tensor, norm: Affine | None) -> tuple[Tensor, ...]:
        """Return normed values and statistics for the gradient; ``x`` alone without a norm."""
        if norm is None:
            return (x,)
        result: tuple[Tensor, ...] = aten.native_layer_norm(
            x, x.shape[-1:], norm.weight, norm.bias, norm.eps
        )
        return result

    def norm_backward(
        self,
        gradient: Tensor,
        x: Tensor,
        norm: Affine,
        statistics: Sequence[Tensor],
        out: Tensor,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Write the gradient by ``x``, (..., C), to ``out``, contiguous, perhaps ``gradient``.

        ``residual``, contiguous, is added to it.

        Returns: the gradients by weight and bias.
        """
        grad_x, grad_weight, grad_bias = aten.native_layer_norm_backward(
            gradient, x, x.shape[-1:], *statistics, norm.weight, norm.bias, [True, True, True]
        )
        if residual is None:
            out.copy_(grad_x)
        else:
            torch.add(grad_x, residual, out=out)
        return grad_weight, grad_bias

    def product(
        self, a: Tensor, b: Tensor, out: Tensor | None = None, *, add: bool = False
    ) -> Tensor:
        """Return the matrix product of (m, k) and (k, n), written or added to ``out`` if given."""
        if out is None:
            return torch.mm(a, b)
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)

    def linear(self, x: Tensor, layer: Affine) -> Tensor:
        """Apply a linear layer to (..., C)."""
        return F.linear(x, layer.weight, layer.bias)

    def level(self, context: Tensor, kernel: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the next level before and after its GELU; the latter zero outside the image."""
        before = depthwise.depthwise(context, kernel)
        return before, self.gelu(before, valid)

    def gelu(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Apply GELU, zero outside the image; any shape without ``valid``."""
        after = F.gelu(x)
        return after if valid is None else after.mul_(valid)

    def linear_(self, out: Tensor, x: Tensor, layer: Affine) -> Tensor:
        """Write a linear layer to ``out``, in the form that the methods which take ``layer`` read.

        Args:
            out: (N, P, D), contiguous.
            x: (N, P, C).
            layer: weight (D, C).
        Returns: ``out``.
        """
        torch.addmm(layer.bias, rows(x), layer.weight.mT, out=rows(out))
        return out

    def residual_(self, branch: Tensor, x: Tensor, _layer: Affine, factors: Tensor | None) -> None:
        """Add ``x`` to a branch whose last layer :meth:`linear_` wrote.

        Args:
            branch, x: (N, P, C), contiguous.
            factors: of the branch, (N, 1, 1) or (1, P, 1), None for 1.
        """
        if factors is not None:
            branch *= factors
        branch += x

    def gate(self, query: Tensor, _q: Affine, modulator: Tensor, _h: Affine) -> Tensor:
        """Return the product of two linear layers that :meth:`linear_` wrote, (N, P, C) each."""
        return query * modulator

    def gate_backward_(
        self, gradient: Tensor, query: Tensor, _q: Affine, modulator: Tensor, _h: Affine
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of :meth:`gate`; ``gradient``, by it, contiguous, is overwritten.

        Returns: those by ``query`` and ``modulator``, and their sums over all but the channels.
        """
        grad_query = gradient * modulator
        gradient *= query
        return grad_query, gradient, rows(grad_query).sum(0), rows(gradient).sum(0)

    def hidden_gelu(self, hidden: Tensor, _fc1: Affine) -> Tensor:
        """Return the GELU of what :meth:`linear_` wrote."""
        return F.gelu(hidden)

    def hidden_backward_(
        self, hidden: Tensor, _fc1: Affine, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute :meth:`hidden_gelu`; the gradient by it, contiguous, becomes that by ``hidden``.

        Returns: the GELU, and the sum of the gradient by ``hidden`` over all but the channels.
        """
        aten.gelu_backward.grad_input(gradient, hidden, grad_input=gradient)
        return F.gelu(hidden), rows(gradient).sum(0)

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

    def gates_gradient(self, grad_sum: Tensor, contexts: list[Tensor], shared: Tensor) -> Tensor:
        """Return the gradient by ``gates`` of :meth:`gated_sum`, from that by its result."""
        parts = [(grad_sum * context).sum(-1) for context in contexts]
        return torch.stack([*parts, (grad_sum @ shared.mT).squeeze(-1)], dim=-1)

    def level_backward(
        self,
        grad_aggregated: Tensor,
        gates: Tensor,
        grad_after: Tensor,
        before: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        """Return the gradient by a level before its GELU.

        Args:
            grad_aggregated: by the gated sum.
            gates: (N, H, W), of this level.
            grad_after: by the level after its GELU through what follows from it; any strides.
            before: the level.
            valid: see the class.
        Returns: (N, H, W, C).
        """
        out = torch.empty_like(before)
        shape = before.shape[0], -1, before.shape[-1]
        flat, after, first = out.view(shape), grad_after.reshape(shape), before.view(shape)
        for tile in tiles(flat):
            grad_tile = grad_aggregated.view(shape)[tile] * gates.flatten(1)[tile][..., None]
            grad_tile += after[tile]
            if valid is not None:
                grad_tile *= valid.flatten(1)[tile][..., None]
            aten.gelu_backward.grad_input(grad_tile, first[tile], grad_input=flat[tile])
        return out

    def depthwise_input_gradient(self, gradient: Tensor, kernel: Tensor) -> Tensor:
        """Compute the gradient, see :mod:`.depthwise`."""
        return depthwise.depthwise_input_gradient(gradient, kernel)

    def depthwise_weight_gradient(self, x: Tensor, gradient: Tensor, size: int) -> Tensor:
        """Compute the gradient, see :mod:`.depthwise`."""
        return depthwise.depthwise_weight_gradient(x, gradient, size)
