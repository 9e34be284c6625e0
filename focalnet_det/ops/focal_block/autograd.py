"""Register the fused branches of a block as PyTorch custom operators.

Custom operators can be compiled, exported, checkpointed and differentiated like stock ones: a graph
holds one node for a branch and one for its backward pass. Each takes its parameters as one list,
and the backend from :func:`.policy.choose_backend`, which is a constant of a recorded graph. Where
nothing records or intercepts operators, the same functions are called directly: an operator in
Python costs some tenths of a millisecond.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .pytorch.training import Options, Residual
from .weights import (
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

# Modules with `block`, `modulation_forward`, `mlp_forward`, their `_backward` and their `_kept`.
BACKEND_MODULES = {
    "torch": ("pytorch.inference", "pytorch.training"),
    "native": ("cpu.native_inference", "cpu.native_training"),
    "triton": ("triton.triton_block", "triton.triton_block"),
}


class ComputePolicy(NamedTuple):
    """How to compute a block.

    Attributes:
        backend: a backend of :mod:`focalnet_det.ops.focal_block.policy` other than the reference.
        dtype: dtype to compute in.
        stored: dtype of the result and of the activations saved for the backward pass.
        recompute: save only the inputs of branches for the backward pass.
    """

    backend: str
    dtype: torch.dtype
    stored: torch.dtype
    recompute: bool = False


def modulation(
    x: Tensor,
    norm: Affine | None,
    weights: ModulationWeights,
    valid: Tensor | None,
    policy: ComputePolicy,
    residual: Residual | None = None,
) -> Tensor:
    """Apply an optional norm and focal modulation to a feature map.

    Args:
        x: (N, H, W, C).
        norm: LayerNorm that is applied to ``x`` first, or None.
        weights: parameters of the modulation.
        valid: (N, H, W, 1), see :func:`focalnet_det.ops.aggregate_contexts`.
        policy: backend and dtypes.
        residual: adds ``x`` to the result if given.
    Returns: (N, H, W, C), in the dtype ``policy.stored``, or that of the sum with ``x``.
        Differentiable once.
    """
    if residual is not None and not _eager(x):
        return residual.add(x, modulation(x, norm, weights, valid, policy))
    parameters, layout = flatten_modulation(norm, weights)
    options = *layout, *policy
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
    policy: ComputePolicy,
    residual: Residual | None = None,
) -> Tensor:
    """Apply an optional norm, then linear, GELU, linear, to (N, H, W, C).

    Args and result as in :func:`modulation`.
    """
    if residual is not None and not _eager(x):
        return residual.add(x, mlp(x, norm, weights, policy))
    parameters, eps = flatten_mlp(norm, weights)
    options = eps, *policy
    if _eager(x):
        out = _Branch.apply((_mlp, _mlp_backward), options, 1, residual, x, *parameters)
    else:
        out, _ = torch.ops.focalnet_det.mlp(x, parameters, *options)
    return cast(Tensor, out)


def block(x: Tensor, weights: BlockWeights, valid: Tensor | None, policy: ComputePolicy) -> Tensor:
    """Apply a whole block without autograd: both branches with their norms and residuals.

    Args:
        x: (N, H, W, C).
        weights: parameters of the block.
        valid: (N, H, W, 1), see :func:`focalnet_det.ops.aggregate_contexts`.
        policy: only ``backend`` and ``dtype`` are read.
    Returns: (N, H, W, C), in the dtype of ``x``.
    """
    if _eager(x):
        return cast(Tensor, _whole_block(x, weights, valid, policy.backend, policy.dtype))
    modulation, layout = flatten_modulation(weights.norm1, weights.modulation)
    mlp, eps = flatten_mlp(weights.norm2, weights.mlp)
    gammas = [gamma for gamma in (weights.gamma_1, weights.gamma_2) if gamma is not None]
    result = torch.ops.focalnet_det.block(
        x,
        valid,
        modulation,
        mlp,
        gammas,
        *layout,
        eps,
        weights.post_norm,
        policy.backend,
        policy.dtype,
    )
    return cast(Tensor, result)


def _eager(x: Tensor) -> bool:
    """Tell whether operators run as they are called, with nothing that records them."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return type(x) in (Tensor, torch.nn.Parameter)


class _Branch(torch.autograd.Function):
    """A branch and its backward pass without custom operators, and optionally a residual sum."""

    @staticmethod
    def forward(
        ctx: Any,
        functions: tuple[Callable, Callable],
        options: tuple,
        inputs: int,
        residual: Residual | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        """Run a branch; ``tensors`` are ``inputs`` input tensors, then the parameters."""
        run, ctx.backward_function = functions
        ctx.extra = {} if residual is None else {"residual": residual}
        out, activations = run(*tensors[:inputs], list(tensors[inputs:]), *options, **ctx.extra)
        ctx.save_for_backward(*tensors, *activations)
        ctx.arguments = options, inputs, len(tensors)
        return cast(Tensor, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        options, inputs, count = ctx.arguments
        saved = ctx.saved_tensors
        parameters, activations = list(saved[inputs:count]), list(saved[count:])
        grad_x, *grad_parameters = ctx.backward_function(
            gradient, *saved[:inputs], parameters, activations, *options, **ctx.extra
        )
        return None, None, None, None, grad_x, *[None] * (inputs - 1), *grad_parameters


@functools.cache
def _module(backend: str, training: bool) -> ModuleType:
    return importlib.import_module(f".{BACKEND_MODULES[backend][training]}", __package__)


def _without_autocast(function: Callable) -> Callable:
    """Disable autocast in a function: the caller chooses the dtypes."""

    @functools.wraps(function)
    def run(x: Tensor, *arguments: Any, **extra: Any) -> Any:
        if not torch.is_autocast_enabled(x.device.type):
            return function(x, *arguments, **extra)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *arguments, **extra)

    return run


# The modulation

_POLICY = "str backend, ScalarType dtype, ScalarType stored, bool recompute"
_LAYOUT = "float? norm_eps, float? ln_eps, bool normalize"


@_without_autocast
def _modulation(
    x: Tensor, valid: Tensor | None, parameters: list[Tensor], *options: Any, **extra: Any
) -> Any:
    layout, policy = ModulationLayout(*options[:3]), ComputePolicy(*options[3:])
    norm, weights = unflatten_modulation(parameters, layout)
    kernels = _module(policy.backend, True)
    return kernels.modulation_forward(x, norm, weights, valid, Options(*policy[1:]), **extra)


def _modulation_shapes(
    x: Tensor, _valid: Tensor | None, parameters: list[Tensor], *options: Any
) -> tuple[Tensor, list[Tensor]]:
    layout, policy = ModulationLayout(*options[:3]), ComputePolicy(*options[3:])
    _, weights = unflatten_modulation(parameters, layout)
    activations = _module(policy.backend, True).modulation_kept(
        x, weights.kernels, Options(*policy[1:])
    )
    return x.new_empty(x.shape, dtype=policy.stored), activations


@_without_autocast
def _modulation_backward(
    gradient: Tensor,
    x: Tensor,
    valid: Tensor | None,
    parameters: list[Tensor],
    activations: list[Tensor],
    *options: Any,
    **extra: Any,
) -> list[Tensor]:
    layout, policy = ModulationLayout(*options[:3]), ComputePolicy(*options[3:])
    norm, weights = unflatten_modulation(parameters, layout)
    gradients = _module(policy.backend, True).modulation_backward(
        gradient, x, norm, weights, valid, activations, Options(*policy[1:]), **extra
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
    x: Tensor, parameters: list[Tensor], norm_eps: float | None, *options: Any, **extra: Any
) -> Any:
    policy = ComputePolicy(*options)
    norm, weights = unflatten_mlp(parameters, norm_eps)
    return _module(policy.backend, True).mlp_forward(
        x, norm, weights, Options(*policy[1:]), **extra
    )


def _mlp_shapes(
    x: Tensor, parameters: list[Tensor], norm_eps: float | None, *options: Any
) -> tuple[Tensor, list[Tensor]]:
    policy = ComputePolicy(*options)
    _, weights = unflatten_mlp(parameters, norm_eps)
    activations = _module(policy.backend, True).mlp_kept(
        x, weights.fc1.weight.shape[0], Options(*policy[1:])
    )
    return x.new_empty(x.shape, dtype=policy.stored), activations


@_without_autocast
def _mlp_backward(
    gradient: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    activations: list[Tensor],
    norm_eps: float | None,
    *options: Any,
    **extra: Any,
) -> list[Tensor]:
    policy = ComputePolicy(*options)
    norm, weights = unflatten_mlp(parameters, norm_eps)
    gradients = _module(policy.backend, True).mlp_backward(
        gradient, x, norm, weights, activations, Options(*policy[1:]), **extra
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
    x: Tensor, weights: BlockWeights, valid: Tensor | None, backend: str, dtype: torch.dtype
) -> Any:
    return _module(backend, False).block(x, weights, valid, dtype)


def _block(
    x: Tensor,
    valid: Tensor | None,
    modulation: list[Tensor],
    mlp: list[Tensor],
    gammas: list[Tensor],
    *options: Any,
) -> Any:
    *layout, eps, post_norm, backend, dtype = options
    norm1, modulation_weights = unflatten_modulation(modulation, ModulationLayout(*layout))
    norm2, mlp_weights = unflatten_mlp(mlp, eps)
    gamma_1, gamma_2 = gammas or (None, None)
    weights = BlockWeights(
        cast(Affine, norm1), modulation_weights, gamma_1, cast(Affine, norm2), mlp_weights,
        gamma_2, post_norm,
    )  # fmt: skip
    return _whole_block(x, weights, valid, backend, dtype)


# Registration


def _keep(ctx: Any, tensors: list[Tensor], activations: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*activations)
    ctx.save_for_backward(*tensors, *activations)


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
    f"(Tensor x, Tensor? valid, Tensor[] parameters, {_LAYOUT}, {_POLICY}) -> (Tensor, Tensor[])",
    _modulation_gradients,
    _keep_modulation,
)
_register(
    "modulation_backward",
    _modulation_backward,
    _gradient_shapes,
    "(Tensor gradient, Tensor x, Tensor? valid, Tensor[] parameters, Tensor[] activations, "
    f"{_LAYOUT}, {_POLICY}) -> Tensor[]",
)
_register(
    "mlp",
    _mlp,
    _mlp_shapes,
    f"(Tensor x, Tensor[] parameters, float? norm_eps, {_POLICY}) -> (Tensor, Tensor[])",
    _mlp_gradients,
    _keep_mlp,
)
_register(
    "mlp_backward",
    _mlp_backward,
    _gradient_shapes,
    "(Tensor gradient, Tensor x, Tensor[] parameters, Tensor[] activations, float? norm_eps, "
    f"{_POLICY}) -> Tensor[]",
)
_register(
    "block",
    _block,
    lambda x, *_: x.new_empty(x.shape),
    "(Tensor x, Tensor? valid, Tensor[] modulation, Tensor[] mlp, Tensor[] gammas, "
    f"{_LAYOUT}, float? norm2_eps, bool post_norm, str backend, ScalarType dtype) -> Tensor",
)
