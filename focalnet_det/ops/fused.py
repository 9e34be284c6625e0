"""Fused branches of a block as operators that PyTorch knows.

As registered operators they can be compiled, exported, checkpointed and differentiated like stock
ones: a graph holds one node for a branch and one for its backward pass. Each takes its parameters
as one list, and the path that :func:`focalnet_det.ops.dispatch.choose_path` chose, which is a
constant of a recorded graph. Where nothing records or intercepts operators, the same functions run
without them: an operator in Python costs some tenths of a millisecond.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels.parameters import (
    Affine,
    BlockWeights,
    MlpWeights,
    ModulationLayout,
    ModulationWeights,
    flatten_mlp,
    flatten_modulation,
    unflatten_mlp,
    unflatten_modulation,
)
from .kernels.training import Options, Residual

# Modules with `block`, `modulation_forward`, `mlp_forward`, their `_backward` and their `_kept`.
PATHS = {
    "torch": ("inference", "training"),
    "native": ("native_inference", "native_training"),
    "triton": ("triton_block", "triton_block"),
}


class Plan(NamedTuple):
    """How a block runs.

    Attributes:
        path: of :mod:`focalnet_det.ops.dispatch`, not the reference.
        dtype: in which to compute.
        stored: in which to return the result and to keep what the backward pass needs.
        recompute: keep the inputs of branches alone for the backward pass.
    """

    path: str
    dtype: torch.dtype
    stored: torch.dtype
    recompute: bool = False


def modulation(
    x: Tensor,
    norm: Affine | None,
    weights: ModulationWeights,
    valid: Tensor | None,
    plan: Plan,
    residual: Residual | None = None,
) -> Tensor:
    """Focal modulation of a map, with the norm before it if there is one.

    Args:
        x: (N, H, W, C).
        norm: applied to ``x``, or None.
        weights: of the modulation.
        valid: (N, H, W, 1), see :func:`focalnet_det.ops.aggregate_contexts`.
        plan: see the class.
        residual: see the class.
    Returns: (N, H, W, C), in the type that is stored, or that of the sum with ``residual``. It can
        be differentiated once.
    """
    if residual is not None and not _eager(x):
        return residual.add(x, modulation(x, norm, weights, valid, plan))
    parameters, layout = flatten_modulation(norm, weights)
    options = *layout, *plan
    if _eager(x):
        functions = _modulation, _modulation_backward
        out = _Branch.apply(functions, options, 2, residual, x, valid, *parameters)
    else:
        out, _ = torch.ops.focalnet_det.modulation(x, valid, parameters, *options)
    return cast(Tensor, out)


def mlp(
    x: Tensor,
    norm: Affine | None,
    weights: MlpWeights,
    plan: Plan,
    residual: Residual | None = None,
) -> Tensor:
    """Linear, GELU, linear, with the norm before them if there is one; see :func:`modulation`."""
    if residual is not None and not _eager(x):
        return residual.add(x, mlp(x, norm, weights, plan))
    parameters, eps = flatten_mlp(norm, weights)
    options = eps, *plan
    if _eager(x):
        out = _Branch.apply((_mlp, _mlp_backward), options, 1, residual, x, *parameters)
    else:
        out, _ = torch.ops.focalnet_det.mlp(x, parameters, *options)
    return cast(Tensor, out)


def block(x: Tensor, weights: BlockWeights, valid: Tensor | None, plan: Plan) -> Tensor:
    """A whole block without autograd: both branches with their norms and residuals.

    Args:
        x: (N, H, W, C).
        weights: of the block.
        valid: (N, H, W, 1), see :func:`focalnet_det.ops.aggregate_contexts`.
        plan: see the class; only ``path`` and ``dtype`` are read.
    Returns: (N, H, W, C), in the type of ``x``.
    """
    if _eager(x):
        return cast(Tensor, _whole_block(x, weights, valid, plan.path, plan.dtype))
    modulation, layout = flatten_modulation(weights.norm1, weights.modulation)
    mlp, eps = flatten_mlp(weights.norm2, weights.mlp)
    gammas = [gamma for gamma in (weights.gamma_1, weights.gamma_2) if gamma is not None]
    result = torch.ops.focalnet_det.block(
        x, valid, modulation, mlp, gammas, *layout, eps, weights.post_norm, plan.path, plan.dtype
    )
    return cast(Tensor, result)


def _eager(x: Tensor) -> bool:
    """Whether operators run as they are called, seen by nobody."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return type(x) in (Tensor, torch.nn.Parameter)


class _Branch(torch.autograd.Function):
    """What the operators of a branch and of its backward pass do, and a residual sum."""

    @staticmethod
    def forward(
        ctx: Any,
        functions: tuple[Callable, Callable],
        options: tuple,
        inputs: int,
        residual: Residual | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        """``tensors``: as many as ``inputs`` says, then parameters."""
        run, ctx.backward_function = functions
        ctx.more = {} if residual is None else {"residual": residual}
        out, kept = run(*tensors[:inputs], list(tensors[inputs:]), *options, **ctx.more)
        ctx.save_for_backward(*tensors, *kept)
        ctx.arguments = options, inputs, len(tensors)
        return cast(Tensor, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        options, inputs, count = ctx.arguments
        saved = ctx.saved_tensors
        parameters, kept = list(saved[inputs:count]), list(saved[count:])
        grad_x, *grad_parameters = ctx.backward_function(
            gradient, *saved[:inputs], parameters, kept, *options, **ctx.more
        )
        return None, None, None, None, grad_x, *[None] * (inputs - 1), *grad_parameters


@functools.cache
def _module(path: str, training: bool) -> ModuleType:
    return importlib.import_module(f".kernels.{PATHS[path][training]}", __package__)


def _without_autocast(function: Callable) -> Callable:
    """Types are chosen by the caller; autocast would turn every linear into its own."""

    @functools.wraps(function)
    def run(x: Tensor, *arguments: Any, **more: Any) -> Any:
        if not torch.is_autocast_enabled(x.device.type):
            return function(x, *arguments, **more)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *arguments, **more)

    return run


# The modulation

_PLAN = "str path, ScalarType dtype, ScalarType stored, bool recompute"
_LAYOUT = "float? norm_eps, float? ln_eps, bool normalize"


@_without_autocast
def _modulation(
    x: Tensor, valid: Tensor | None, parameters: list[Tensor], *options: Any, **more: Any
) -> Any:
    layout, plan = ModulationLayout(*options[:3]), Plan(*options[3:])
    norm, weights = unflatten_modulation(parameters, layout)
    kernels = _module(plan.path, True)
    return kernels.modulation_forward(x, norm, weights, valid, Options(*plan[1:]), **more)


def _modulation_shapes(
    x: Tensor, _valid: Tensor | None, parameters: list[Tensor], *options: Any
) -> tuple[Tensor, list[Tensor]]:
    layout, plan = ModulationLayout(*options[:3]), Plan(*options[3:])
    _, weights = unflatten_modulation(parameters, layout)
    kept = _module(plan.path, True).modulation_kept(x, weights.kernels, Options(*plan[1:]))
    return x.new_empty(x.shape, dtype=plan.stored), kept


@_without_autocast
def _modulation_backward(
    gradient: Tensor,
    x: Tensor,
    valid: Tensor | None,
    parameters: list[Tensor],
    kept: list[Tensor],
    *options: Any,
    **more: Any,
) -> list[Tensor]:
    layout, plan = ModulationLayout(*options[:3]), Plan(*options[3:])
    norm, weights = unflatten_modulation(parameters, layout)
    gradients = _module(plan.path, True).modulation_backward(
        gradient, x, norm, weights, valid, kept, Options(*plan[1:]), **more
    )
    return _as_parameters(gradients, parameters)


def _modulation_gradients(ctx: Any, gradient: Tensor | None, _kept: Any) -> tuple:
    count, masked, options = ctx.arguments
    if gradient is None:
        return None, None, [None] * count, *[None] * len(options)
    x, *rest = ctx.saved_tensors
    valid = rest.pop(0) if masked else None
    grad_x, *grad_parameters = torch.ops.focalnet_det.modulation_backward(
        gradient, x, valid, rest[:count], rest[count:], *options
    )
    return grad_x, None, grad_parameters, *[None] * len(options)


def _keep_modulation(ctx: Any, inputs: tuple, output: tuple[Tensor, list[Tensor]]) -> None:
    x, valid, parameters, *options = inputs
    _keep(ctx, [x, *([] if valid is None else [valid]), *parameters], output[1])
    ctx.arguments = len(parameters), valid is not None, options


# The MLP


@_without_autocast
def _mlp(
    x: Tensor, parameters: list[Tensor], norm_eps: float | None, *options: Any, **more: Any
) -> Any:
    plan = Plan(*options)
    norm, weights = unflatten_mlp(parameters, norm_eps)
    return _module(plan.path, True).mlp_forward(x, norm, weights, Options(*plan[1:]), **more)


def _mlp_shapes(
    x: Tensor, parameters: list[Tensor], norm_eps: float | None, *options: Any
) -> tuple[Tensor, list[Tensor]]:
    plan = Plan(*options)
    _, weights = unflatten_mlp(parameters, norm_eps)
    kept = _module(plan.path, True).mlp_kept(x, weights.fc1.weight.shape[0], Options(*plan[1:]))
    return x.new_empty(x.shape, dtype=plan.stored), kept


@_without_autocast
def _mlp_backward(
    gradient: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    kept: list[Tensor],
    norm_eps: float | None,
    *options: Any,
    **more: Any,
) -> list[Tensor]:
    plan = Plan(*options)
    norm, weights = unflatten_mlp(parameters, norm_eps)
    gradients = _module(plan.path, True).mlp_backward(
        gradient, x, norm, weights, kept, Options(*plan[1:]), **more
    )
    return _as_parameters(gradients, parameters)


def _mlp_gradients(ctx: Any, gradient: Tensor | None, _kept: Any) -> tuple:
    count, options = ctx.arguments
    if gradient is None:
        return None, [None] * count, *[None] * len(options)
    x, *rest = ctx.saved_tensors
    grad_x, *grad_parameters = torch.ops.focalnet_det.mlp_backward(
        gradient, x, rest[:count], rest[count:], *options
    )
    return grad_x, grad_parameters, *[None] * len(options)


def _keep_mlp(ctx: Any, inputs: tuple, output: tuple[Tensor, list[Tensor]]) -> None:
    x, parameters, *options = inputs
    _keep(ctx, [x, *parameters], output[1])
    ctx.arguments = len(parameters), options


# The block in inference


@_without_autocast
def _whole_block(
    x: Tensor, weights: BlockWeights, valid: Tensor | None, path: str, dtype: torch.dtype
) -> Any:
    return _module(path, False).block(x, weights, valid, dtype)


def _block(
    x: Tensor,
    valid: Tensor | None,
    modulation: list[Tensor],
    mlp: list[Tensor],
    gammas: list[Tensor],
    *options: Any,
) -> Any:
    *layout, eps, post_norm, path, dtype = options
    norm1, modulation_weights = unflatten_modulation(modulation, ModulationLayout(*layout))
    norm2, mlp_weights = unflatten_mlp(mlp, eps)
    gamma_1, gamma_2 = gammas or (None, None)
    weights = BlockWeights(
        cast(Affine, norm1), modulation_weights, gamma_1, cast(Affine, norm2), mlp_weights,
        gamma_2, post_norm,
    )  # fmt: skip
    return _whole_block(x, weights, valid, path, dtype)


# Registration


def _keep(ctx: Any, tensors: list[Tensor], kept: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(*tensors, *kept)


def _as_parameters(gradients: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    grad_x, *rest = gradients
    return [
        grad_x,
        *(g.to(p.dtype).contiguous() for g, p in zip(rest, parameters, strict=True)),
    ]


def _gradient_shapes(_gradient: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    lists = [argument for argument in arguments if isinstance(argument, (list, tuple))]
    return [x.new_empty(x.shape), *(p.new_empty(p.shape) for p in lists[0])]


def _register(
    name: str,
    function: Callable,
    shapes: Callable,
    schema: str,
    gradients: Callable | None = None,
    keep: Callable | None = None,
) -> None:
    operator = torch.library.custom_op(
        f"focalnet_det::{name}", function, mutates_args=(), schema=schema
    )
    operator.register_fake(shapes)
    if gradients is not None:
        operator.register_autograd(gradients, setup_context=keep)


_register(
    "modulation",
    _modulation,
    _modulation_shapes,
    f"(Tensor x, Tensor? valid, Tensor[] parameters, {_LAYOUT}, {_PLAN}) -> (Tensor, Tensor[])",
    _modulation_gradients,
    _keep_modulation,
)
_register(
    "modulation_backward",
    _modulation_backward,
    _gradient_shapes,
    "(Tensor gradient, Tensor x, Tensor? valid, Tensor[] parameters, Tensor[] kept, "
    f"{_LAYOUT}, {_PLAN}) -> Tensor[]",
)
_register(
    "mlp",
    _mlp,
    _mlp_shapes,
    f"(Tensor x, Tensor[] parameters, float? norm_eps, {_PLAN}) -> (Tensor, Tensor[])",
    _mlp_gradients,
    _keep_mlp,
)
_register(
    "mlp_backward",
    _mlp_backward,
    _gradient_shapes,
    "(Tensor gradient, Tensor x, Tensor[] parameters, Tensor[] kept, float? norm_eps, "
    f"{_PLAN}) -> Tensor[]",
)
_register(
    "block",
    _block,
    lambda x, *_: x.new_empty(x.shape),
    "(Tensor x, Tensor? valid, Tensor[] modulation, Tensor[] mlp, Tensor[] gammas, "
    f"{_LAYOUT}, float? norm2_eps, bool post_norm, str path, ScalarType dtype) -> Tensor",
)
