"""Compute the branches of a block with backward passes of their own, which keep little.

A stock block keeps 21 to 23 tensors as large as its input for the backward pass. Here the
modulation keeps its input, the query, the projected context, the modulator and the levels before
their GELU but the first, which is recomputed, as are norms, GELUs and sums (where the first kernel
is wide, the modulator is recomputed and that level is kept); the MLP keeps its input and the hidden
layer before its GELU. What is recomputed costs a small part of what reading and writing it would.
With ``recompute`` everything but the inputs is recomputed.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights import Affine, MlpWeights, ModulationWeights
from .steps import Steps
from .tiles import Tile, rows, tiles

aten = torch.ops.aten


class Options(NamedTuple):
    """How a branch is computed in training.

    Attributes:
        dtype: in which to compute.
        stored: in which to return the result and to keep what the backward pass needs.
        recompute: keep the input alone.
    """

    dtype: torch.dtype
    stored: torch.dtype
    recompute: bool


class Residual(NamedTuple):
    """Says that the result is the input plus the branch.

    Attributes:
        factors: what the branch of each image is multiplied by, (N, 1, 1, 1), without a gradient;
            None for 1.
    """

    factors: Tensor | None

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return the sum, (N, H, W, C)."""
        return x + self.scale(branch)

    def scale(self, x: Tensor) -> Tensor:
        """Multiply ``x``, (N, H, W, C), by the factors."""
        return x if self.factors is None else x * self.factors

    def of(self, flat: Tensor, tile: Tile) -> Tensor | None:
        """Return the factors, (n, 1, 1) or (1, p, 1), of a tile of (N, P, C) or (1, N * P, C)."""
        if self.factors is None:
            return None
        images = self.factors.view(-1, 1, 1)
        if len(flat) == len(images):
            return images[tile[0]]
        pixels = flat.shape[1] // len(images)
        return images.expand(-1, pixels, 1).reshape(1, -1, 1)[tile]


PLAIN = Steps()
# A convolution up to this wide costs less than the product with the weights of ``h``.
CHEAP_KERNEL = 5


def modulation_forward(
    x: Tensor,
    norm: Affine | None,
    weights: ModulationWeights,
    valid: Tensor | None,
    options: Options,
    steps: Steps = PLAIN,
    residual: Residual | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Apply focal modulation to a map, with the norm before it if there is one.

    Args:
        x: (N, H, W, C).
        norm: applied to ``x``, or None.
        weights: of the modulation.
        valid: (N, H, W, 1), see :func:`focalnet_det.ops.aggregate_contexts`.
        options: see the class.
        steps: what computes the parts that are no matrix products.
        residual: see the class.
    Returns: (N, H, W, C), in the type that is stored, and what :func:`modulation_kept` lists. With
        a residual, in the type of its sum.
    """
    run = _Run(x, norm, weights, valid, options.dtype, steps)
    run.project()
    run.contextualise()
    if not options.recompute and keeps_modulator(weights.kernels):
        run.modulators = torch.empty_like(run.flat)
    into = _Result(x, run.flat.shape, options, steps, residual)
    for tile in tiles(run.flat):
        modulator = run.modulate(run.aggregate(tile), tile)
        product = steps.gate(run.query[tile], run.q, modulator, run.weights.h)
        product, *_ = steps.norm(product, run.weights.ln)
        into.write(tile, product, run.weights.proj)
    kept = [] if options.recompute else run.kept()
    return into.out.view(x.shape), [tensor.to(options.stored) for tensor in kept]


def modulation_backward(
    gradient: Tensor,
    x: Tensor,
    norm: Affine | None,
    weights: ModulationWeights,
    valid: Tensor | None,
    kept: list[Tensor],
    options: Options,
    steps: Steps = PLAIN,
    residual: Residual | None = None,
) -> list[Tensor]:
    """Return gradients by ``x`` and by the tensors of ``norm`` and then of ``weights``."""
    run = _Run(x, norm, weights, valid, options.dtype, steps)
    if kept:
        run.take(tensor.to(run.dtype) for tensor in kept)
    run.project()
    run.contextualise()
    if residual is None:
        grad_x, grad_tensors = run.backward(gradient)
    else:
        grad_x, grad_tensors = run.backward(residual.scale(gradient), gradient)
    return [grad_x, *grad_tensors]


def modulation_kept(x: Tensor, kernels: Sequence[Tensor], options: Options) -> list[Tensor]:
    """Return tensors like those that ``_Run.kept`` lists, without values."""
    n, h, w, c = x.shape
    count = 0 if options.recompute else len(kernels) + 2
    return [x.new_empty((n, h, w, c), dtype=options.stored) for _ in range(count)]


def keeps_modulator(kernels: Sequence[Tensor]) -> bool:
    """Tell whether the modulator is kept for the backward pass in the place of the first level."""
    return bool(kernels) and kernels[0].shape[-1] <= CHEAP_KERNEL


class _Run:
    """One evaluation of the modulation: the intermediate results, and the backward pass."""

    def __init__(
        self,
        x: Tensor,
        norm: Affine | None,
        weights: ModulationWeights,
        valid: Tensor | None,
        dtype: torch.dtype,
        steps: Steps,
    ) -> None:
        self.steps = steps
        self.dtype, self.out_dtype, self.shape = dtype, x.dtype, x.shape
        self.norm1 = None if norm is None else norm.to(dtype)
        self.weights = weights.to(dtype)
        n, h, w, c = x.shape
        self.q = Affine(self.weights.f.weight[:c], self.weights.f.bias[:c])
        self.x = x.to(self.dtype).contiguous()
        self.flat = self.x.view(n, h * w, c)
        self.valid = None if valid is None else valid.to(self.dtype)
        self.area = h * w if self.valid is None else self.valid.sum((1, 2))
        self.query: Any = None
        self.modulators: Tensor | None = None
        self.levels: list[Any] = [None] * len(weights.kernels)

    def take(self, kept: Iterator[Tensor]) -> None:
        """Use what :meth:`kept` of an earlier evaluation lists."""
        self.query, self.context = next(kept).view_as(self.flat), next(kept)
        if keeps_modulator(self.weights.kernels):
            self.modulators = next(kept).view_as(self.flat)
            self.levels[1:] = kept
        else:
            self.levels = list(kept)

    def kept(self) -> list[Tensor]:
        """Return query, projected context, modulator or the first level, and the other levels.

        Levels are those before their GELU. All are (N, H, W, C).
        """
        levels = list(self.levels)
        if self.modulators is not None:
            levels[0] = self.modulators.view(self.shape)
        return [self.query.view(self.shape), self.context, *levels]

    def project(self) -> None:
        """Project query, context and gates of all pixels, the former two if they are not kept."""
        c = self.shape[-1]
        normed, *self.statistics = self.steps.norm(self.flat, self.norm1)
        self.normed = normed
        weight, bias = self.weights.f.weight, self.weights.f.bias
        self.gates = F.linear(normed, weight[2 * c :], bias[2 * c :]) / self.weights.divisor
        if self.query is not None:
            return
        self.query = self.steps.linear_(torch.empty_like(normed), normed, self.q)
        context = Affine(weight[c : 2 * c], bias[c : 2 * c])
        self.context = self.steps.linear(normed, context).view(self.shape)
        if self.valid is not None:
            self.context *= self.valid

    def contextualise(self) -> None:
        """Compute levels before their GELU, if not kept, and after; the global context."""
        self.contexts = [self.context]
        for level, kernel in enumerate(self.weights.kernels):
            before = self.levels[level]
            if before is None:
                before, context = self.steps.level(self.contexts[-1], kernel, self.valid)
                self.levels[level] = before
            else:
                context = self.steps.gelu(before, self.valid)
            self.contexts.append(context)
        self.mean = self.contexts[-1].sum((1, 2)) / self.area
        self.shared = F.gelu(self.mean)[:, None]

    def aggregate(self, tile: tuple) -> Tensor:
        """Return the gated sum of all contexts of a tile."""
        return self.steps.gated_sum(self.parts(tile), self.gates[tile], self.shared[tile[0]])

    def modulate(self, aggregated: Tensor, tile: tuple) -> Tensor:
        """Return the modulator of a tile, which is written where it is kept."""
        kept = self.modulators
        out = torch.empty_like(aggregated) if kept is None else kept[tile]
        return self.steps.linear_(out, aggregated, self.weights.h)

    def parts(self, tile: tuple) -> list[Tensor]:
        """Return a tile of the context after each level."""
        return [context.view_as(self.flat)[tile] for context in self.contexts[1:]]

    def backward(
        self, gradient: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the gradients by ``x`` and by the tensors that :func:`modulation` lists.

        ``residual`` is added to the former.
        """
        weights, c = self.weights, self.shape[-1]
        gradient = gradient.to(self.dtype).contiguous().view_as(self.flat)
        grad_h, grad_proj, grad_ln, grad_norm = (Sums(self.steps) for _ in range(4))
        grad_f = [torch.empty_like(tensor) for tensor in weights.f[:2]]
        parts = slice(c), slice(c, 2 * c), slice(2 * c, None)
        grad_q, grad_c, grad_g = (
            Sums(self.steps, *(tensor[part] for tensor in grad_f)) for part in parts
        )
        grad_context = torch.empty_like(self.flat)  # the aggregated one
        grad_normed = torch.empty_like(self.flat)
        grad_gates = torch.empty_like(self.gates)

        for tile in tiles(self.flat):
            aggregated, query = self.aggregate(tile), self.query[tile]
            if self.modulators is None:
                modulator = self.modulate(aggregated, tile)
            else:
                modulator = self.modulators[tile]
            product = self.steps.gate(query, self.q, modulator, weights.h)
            normed, *statistics = self.steps.norm(product, weights.ln)
            grad_product = _linear_backward(gradient[tile], normed, weights.proj.weight, grad_proj)
            self._norm_backward_(grad_product, product, weights.ln, statistics, grad_ln)
            grad_query, grad_modulator, grad_q_bias, grad_h_bias = self.steps.gate_backward_(
                grad_product, query, self.q, modulator, weights.h
            )
            _linear_backward(
                grad_query, self.normed[tile], self.q.weight, grad_q,
                out=grad_normed[tile], grad_bias=grad_q_bias,
            )  # fmt: skip
            grad_tile = grad_context[tile]
            _linear_backward(
                grad_modulator,
                aggregated,
                weights.h.weight,
                grad_h,
                out=grad_tile,
                grad_bias=grad_h_bias,
            )
            grad_gates[tile] = self.steps.gates_gradient(
                grad_tile, self.parts(tile), self.shared[tile[0]]
            )

        grad_projected, grad_kernels = self._levels_backward(grad_context)
        grad_gates /= weights.divisor
        for grad_part, weight, total in (
            (grad_projected, weights.f.weight[c : 2 * c], grad_c),
            (grad_gates, weights.f.weight[2 * c :], grad_g),
        ):
            _linear_backward(grad_part, self.normed, weight, total, out=grad_normed, add=True)
        direct = None
        if residual is not None and self.norm1 is not None and residual.dtype == self.dtype:
            direct = residual.contiguous().view_as(self.flat)
        self._norm_backward_(grad_normed, self.flat, self.norm1, self.statistics, grad_norm, direct)
        grad_x = grad_normed.view(self.shape).to(self.out_dtype)
        return (
            grad_x if residual is None or direct is not None else grad_x + residual,
            [*grad_norm, *grad_f, *grad_h, *grad_proj, *grad_ln, *grad_kernels],
        )

    def _norm_backward_(
        self,
        gradient: Tensor,
        x: Tensor,
        norm: Affine | None,
        statistics: Any,
        sums: "Sums",
        residual: Tensor | None = None,
    ) -> None:
        """Turn the gradient into that by ``x``; add those by weight and bias to ``sums``."""
        if norm is not None:
            sums.add(*self.steps.norm_backward(gradient, x, norm, statistics, gradient, residual))

    def _levels_backward(self, grad_aggregated: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the gradients by the projected context and by the depthwise kernels."""
        weights, count = self.weights, len(self.weights.kernels)
        grad_shared = self.gates[..., -1:].mT @ grad_aggregated
        grad_mean = aten.gelu_backward(grad_shared[:, 0], self.mean) / self.area
        grad_next = grad_mean[:, None, None].expand(self.shape)
        grad_kernels: list[Tensor] = []
        for level in range(count - 1, -1, -1):
            grad_level = self.steps.level_backward(
                grad_aggregated.view(self.shape),
                self.gates[..., level].view(self.shape[:3]),
                grad_next,
                self.levels[level],
                self.valid,
            )
            kernel = weights.kernels[level]
            grad_kernel = self.steps.depthwise_weight_gradient(
                self.contexts[level], grad_level, kernel.shape[-1]
            )
            grad_kernels.insert(0, grad_kernel)
            grad_next = self.steps.depthwise_input_gradient(grad_level, kernel)
        if self.valid is not None:
            grad_next = grad_next * self.valid
        return grad_next.reshape(self.flat.shape), grad_kernels


def mlp_forward(
    x: Tensor,
    norm: Affine | None,
    weights: MlpWeights,
    options: Options,
    steps: Steps = PLAIN,
    residual: Residual | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Apply linear, GELU, linear, with the norm before them if there is one.

    Returns: as :func:`modulation_forward`; what is kept is what :meth:`Steps.linear_` writes.
    """
    dtype, stored, recompute = options
    norm, (fc1, fc2) = _mlp_weights(norm, weights, dtype)
    flat = x.contiguous().view(1, -1, x.shape[-1])
    into = _Result(x, flat.shape, options, steps, residual)
    kept = mlp_kept(x, len(fc1.weight), options)
    for tile in tiles(flat):
        normed, *_ = steps.norm(flat[tile].to(dtype), norm)
        direct = not recompute and stored == dtype
        hidden = kept[0][tile] if direct else _hidden(normed, fc1)
        steps.linear_(hidden, normed, fc1)
        if not recompute and not direct:
            kept[0][tile] = hidden
        into.write(tile, steps.hidden_gelu(hidden, fc1), fc2)
    return into.out.view(x.shape), kept


def mlp_backward(
    gradient: Tensor,
    x: Tensor,
    norm: Affine | None,
    weights: MlpWeights,
    kept: list[Tensor],
    options: Options,
    steps: Steps = PLAIN,
    residual: Residual | None = None,
) -> list[Tensor]:
    """Return the gradients by ``x``, by ``norm`` if there is one, and by the two linear layers."""
    dtype = options.dtype
    norm, (fc1, fc2) = _mlp_weights(norm, weights, dtype)
    flat = x.contiguous().view(1, -1, x.shape[-1])
    grad_sum = gradient.contiguous().view_as(flat)
    if residual is not None:
        gradient = residual.scale(gradient)
    gradient = gradient.contiguous().view_as(flat)
    fuse = residual is not None and norm is not None and grad_sum.dtype == x.dtype == dtype
    grad_x = torch.empty_like(flat)
    grad_norm, grad_fc1, grad_fc2 = (Sums(steps) for _ in range(3))
    for tile in tiles(flat):
        before = flat[tile].to(dtype)
        normed, *statistics = steps.norm(before, norm)
        if kept:
            hidden = kept[0][tile].to(dtype)
        else:
            hidden = _hidden(normed, fc1)
            steps.linear_(hidden, normed, fc1)
        grad_out = gradient[tile].to(dtype)
        grad_hidden = steps.product(rows(grad_out), fc2.weight).view(*grad_out.shape[:-1], -1)
        after, grad_bias = steps.hidden_backward_(hidden, fc1, grad_hidden)
        grad_fc2.add_products(grad_out, after)
        grad_normed = _linear_backward(
            grad_hidden, normed, fc1.weight, grad_fc1, grad_bias=grad_bias
        )
        if norm is None:
            grad_x[tile] = grad_normed
            continue
        grad_tile = grad_x[tile] if grad_x.dtype == dtype else grad_normed
        direct = grad_sum[tile] if fuse else None
        grad_norm.add(
            *steps.norm_backward(grad_normed, before, norm, statistics, grad_tile, direct)
        )
        if grad_x.dtype != dtype:
            grad_x[tile] = grad_tile
    if residual is not None and not fuse:
        grad_x = grad_x + grad_sum
    return [grad_x.view(x.shape), *grad_norm, *grad_fc1, *grad_fc2]


def mlp_kept(x: Tensor, hidden: int, options: Options) -> list[Tensor]:
    """Return the hidden layer before its GELU, (1, P, hidden), without values."""
    shape = (1, x.shape[0] * x.shape[1] * x.shape[2], hidden)
    return [] if options.recompute else [x.new_empty(shape, dtype=options.stored)]


def _mlp_weights(
    norm: Affine | None, weights: MlpWeights, dtype: torch.dtype
) -> tuple[Affine | None, MlpWeights]:
    return None if norm is None else norm.to(dtype), weights.to(dtype)


def _hidden(x: Tensor, fc1: Affine) -> Tensor:
    """Return memory for a hidden layer."""
    return x.new_empty(*x.shape[:-1], len(fc1.weight))


def _linear(x: Tensor, weights: Affine) -> Tensor:
    return F.linear(x, weights.weight, weights.bias)


class _Result:
    """Where a branch writes its last layer, tile by tile, or the sum of that and its input."""

    def __init__(
        self,
        x: Tensor,
        shape: torch.Size,
        options: Options,
        steps: Steps,
        residual: Residual | None,
    ) -> None:
        """Allocate the result; ``shape`` is that of the tiled map, (N, P, C) or (1, N * P, C)."""
        self.x, self.steps, self.residual = x.contiguous().view(shape), steps, residual
        stored = options.stored
        dtype = stored if residual is None else torch.promote_types(x.dtype, stored)
        self.out = torch.empty_like(self.x, dtype=dtype)

    def write(self, tile: Tile, product: Tensor, layer: Affine) -> None:
        """Write the layer applied to ``product``."""
        out, x = self.out[tile], self.x[tile]
        if self.residual is None:
            _linear_into(out, product, layer)
            return
        factors = self.residual.of(self.x, tile)
        if out.dtype == x.dtype == product.dtype:
            self.steps.linear_(out, product, layer)
            self.steps.residual_(out, x, layer, factors)
        else:
            branch = _linear(product, layer)
            torch.add(x, branch if factors is None else branch * factors, out=out)


def _linear_into(out: Tensor, x: Tensor, weights: Affine) -> None:
    """Write ``out = weights(x)`` without a pass of its own for ``out`` where the types agree."""
    if out.dtype == x.dtype:
        torch.addmm(weights.bias, rows(x), weights.weight.mT, out=rows(out))
    else:
        out.copy_(_linear(x, weights))


class Sums:
    """Return the gradients by weight and bias of a layer, summed over tiles; none before the first.

    Args:
        steps: computes the products.
        weight, bias: memory for them; new one if there is none.
    """

    def __init__(
        self, steps: Steps, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> None:
        self.steps, self._weight, self._bias, self._empty = steps, weight, bias, True

    def __iter__(self) -> Iterator[Tensor]:
        return iter(
            [] if self._weight is None or self._bias is None else [self._weight, self._bias]
        )

    def add_products(self, gradient: Tensor, x: Tensor, grad_bias: Tensor | None = None) -> None:
        """Add those of a linear layer; ``grad_bias`` is the sum of ``gradient``, if known."""
        flat, x = rows(gradient), rows(x)
        grad_bias = flat.sum(0) if grad_bias is None else grad_bias
        if self._weight is None or self._bias is None:
            self._weight, self._bias = self.steps.product(flat.mT, x), grad_bias
        elif self._empty:
            self.steps.product(flat.mT, x, self._weight)
            self._bias.copy_(grad_bias)
        else:
            self.steps.product(flat.mT, x, self._weight, add=True)
            self._bias.add_(grad_bias)
        self._empty = False

    def add(self, grad_weight: Tensor, grad_bias: Tensor) -> None:
        """Add those of a norm."""
        if self._weight is None or self._bias is None:
            self._weight, self._bias = grad_weight, grad_bias
        else:
            self._weight.add_(grad_weight)
            self._bias.add_(grad_bias)


def _linear_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    sums: Sums,
    out: Tensor | None = None,
    add: bool = False,
    grad_bias: Tensor | None = None,
) -> Tensor:
    """Write or add the gradient by ``x`` to ``out``; add those by weight and bias to ``sums``."""
    sums.add_products(gradient, x, grad_bias)
    into = None if out is None else rows(out)
    grad_x = sums.steps.product(rows(gradient), weight, into, add=add)
    return grad_x.view(*gradient.shape[:-1], -1)
