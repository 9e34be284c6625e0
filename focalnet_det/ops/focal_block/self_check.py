"""Hold the kernels of a backend to plain PyTorch before their first use.

On first use on a device and dtype, small blocks run on the backend and as written in the paper,
values and all gradients. Kernels that differ, or fail, are not used, and one warning says so. What
passed is remembered on disk by the sources of the kernels, the device and the versions of PyTorch
and Triton, so that later processes do not repeat it.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...atomic import replacing
from ..cpu import capabilities, library_cache
from ..cpu import library as native
from . import autograd
from .pytorch.training import Residual
from .weights import Affine, BlockWeights, MlpWeights, ModulationWeights

# Batch, height, width, channels and kernels of focal levels of the blocks: sides and channels that
# no tile divides, one and two levels.
SHAPES = ((1, 5, 7, 8, (3, 5)), (2, 9, 4, 40, (7,)))
# Largest difference over the largest value.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}

logger = logging.getLogger(__name__)


@functools.cache
def problem(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return what is wrong with the kernels of a backend, "" if they compute what they should.

    Args:
        backend: ``native`` or ``triton``.
        device: where they would run.
        dtype: dtype that they would compute in.
    """
    if _has_passed(backend, device, dtype):
        return ""
    with _alone():
        found = check(backend, device, dtype)
    if found:
        logger.warning(
            "The %s kernels for %s are not used: %s. Blocks run without them, more slowly; please "
            "report it with the versions of PyTorch and the driver or compiler.",
            backend,
            str(dtype).removeprefix("torch."),
            found,
        )
        return f"the {backend} kernels fail their check: {found}"
    _remember(backend, device, dtype)
    return ""


def check(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Compare the kernels with plain PyTorch in float32; return what differs, "" for nothing."""
    try:
        for n, h, w, c, kernels in SHAPES:
            generator = torch.Generator().manual_seed(0)
            weights = _random_weights(c, kernels, generator, device, dtype)
            x = torch.randn(n, h, w, c, generator=generator).to(device, dtype)
            gradient = torch.randn(n, h, w, c, generator=generator).to(device)
            expected = _reference_results(x, weights, gradient)
            actual = _backend_results(x, weights, gradient, backend)
            for (name, wanted), value in zip(expected, actual, strict=True):
                difference = float((value.float() - wanted).abs().max() / wanted.abs().max())
                if not difference <= TOLERANCE[dtype]:
                    return f"{name} differs from plain PyTorch by {difference:.1e} of its maximum"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def reference_block(x: Tensor, weights: BlockWeights) -> Tensor:
    """Compute a pre-norm block as written in the paper, (N, H, W, C), in plain PyTorch."""
    modulation, mlp, c = weights.modulation, weights.mlp, x.shape[-1]
    normed = F.layer_norm(x, (c,), weights.norm1.weight, weights.norm1.bias, weights.norm1.eps)
    projected = F.linear(normed, modulation.f.weight, modulation.f.bias).permute(0, 3, 1, 2)
    query, context, gates = projected.split((c, c, len(modulation.kernels) + 1), dim=1)
    total = torch.zeros_like(context)
    for level, kernel in enumerate(modulation.kernels):
        context = F.gelu(F.conv2d(context, kernel, padding=kernel.shape[-1] // 2, groups=c))
        total = total + context * gates[:, level : level + 1]
    total = total + F.gelu(context.mean((2, 3), keepdim=True)) * gates[:, -1:]
    total = (total / modulation.divisor).permute(0, 2, 3, 1)
    product = query.permute(0, 2, 3, 1) * F.linear(total, modulation.h.weight, modulation.h.bias)
    x = x + F.linear(product, modulation.proj.weight, modulation.proj.bias)
    normed = F.layer_norm(x, (c,), weights.norm2.weight, weights.norm2.bias, weights.norm2.eps)
    hidden = F.gelu(F.linear(normed, mlp.fc1.weight, mlp.fc1.bias))
    return x + F.linear(hidden, mlp.fc2.weight, mlp.fc2.bias)


def _reference_results(
    x: Tensor, weights: BlockWeights, gradient: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and values: result in inference, result in training, gradients; float32."""
    x = x.detach().float().requires_grad_()
    weights = _map_weights(weights, lambda t: t.detach().float().requires_grad_())
    out = reference_block(x, weights)
    inputs = _tensors(x, weights)
    yield "the result in inference", out.detach()
    yield "the result in training", out.detach()
    for i, grad in enumerate(torch.autograd.grad((out * gradient).sum(), inputs)):
        yield f"gradient {i}", grad


def _backend_results(
    x: Tensor, weights: BlockWeights, gradient: Tensor, backend: str
) -> Iterator[Tensor]:
    policy = autograd.ComputePolicy(backend, x.dtype, x.dtype)
    with torch.no_grad():
        yield autograd.block(x, weights, None, policy)
    x = x.detach().requires_grad_()
    weights = _map_weights(weights, lambda t: t.detach().requires_grad_())
    residual = Residual(None)
    out = autograd.modulation(x, weights.norm1, weights.modulation, None, policy, residual)
    out = autograd.mlp(out, weights.norm2, weights.mlp, policy, residual)
    yield out.detach()
    yield from torch.autograd.grad((out.float() * gradient).sum(), _tensors(x, weights))


def _random_weights(
    c: int,
    kernels: Sequence[int],
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
) -> BlockWeights:
    def random(*shape: int) -> Tensor:
        fan_in = max(1, torch.Size(shape[1:]).numel())
        values = torch.randn(shape, generator=generator) / fan_in**0.5
        return values.to(device, dtype)

    def layer(outputs: int, inputs: int) -> Affine:
        return Affine(random(outputs, inputs), random(outputs))

    def norm() -> Affine:
        return Affine(random(c), random(c), 1e-5)

    levels = [random(c, 1, k, k) for k in kernels]
    f = layer(2 * c + len(kernels) + 1, c)
    modulation = ModulationWeights(f, layer(c, c), layer(c, c), None, levels, False)
    mlp = MlpWeights(layer(3 * c, c), layer(c, 3 * c))
    return BlockWeights(norm(), modulation, None, norm(), mlp, None, False)


def _tensors(x: Tensor, weights: BlockWeights) -> list[Tensor]:
    modulation, mlp = weights.modulation, weights.mlp
    layers = (weights.norm1, modulation.f, modulation.h, modulation.proj)
    return [
        x,
        *(t for layer in layers for t in layer[:2]),
        *modulation.kernels,
        *(t for layer in (weights.norm2, *mlp) for t in layer[:2]),
    ]


def _map_weights(weights: BlockWeights, function: Callable[[Tensor], Tensor]) -> BlockWeights:
    def affine(layer: Affine) -> Affine:
        return Affine(function(layer.weight), function(layer.bias), layer.eps)

    modulation, mlp = weights.modulation, weights.mlp
    return weights._replace(
        norm1=affine(weights.norm1),
        norm2=affine(weights.norm2),
        modulation=modulation._replace(
            f=affine(modulation.f),
            h=affine(modulation.h),
            proj=affine(modulation.proj),
            kernels=[function(kernel) for kernel in modulation.kernels],
        ),
        mlp=MlpWeights(affine(mlp.fc1), affine(mlp.fc2)),
    )


@contextmanager
def _alone() -> Iterator[None]:
    """Run as outside of everything that records, intercepts or changes operators."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_disable_current_modes())
        for device in ("cpu", "cuda"):
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


# What has passed


def _has_passed(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    try:
        content = json.loads(_file().read_text())
    except (OSError, ValueError, library_cache.CacheError):
        return False
    return isinstance(content, list) and _key(backend, device, dtype) in content


def _remember(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    try:
        file = _file()
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError):
            content = []
        before = content if isinstance(content, list) else []
        with replacing(file, durable=False) as temporary:
            temporary.write_text(json.dumps([*before, _key(backend, device, dtype)], indent=1))
    except (OSError, library_cache.CacheError) as error:
        logger.info("The check of the %s kernels is repeated each time: %s.", backend, error)


def _file() -> Path:
    return library_cache.cache_folder() / "checked-kernels.json"


def _key(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return a hash of all that the verdict depends on."""
    parts = [backend, device.type, str(dtype), torch.__version__]
    if backend == "native":
        library = native.library()
        parts += [capabilities.fingerprint(), getattr(library, "key", str(library))]
    else:
        import triton

        parts += [triton.__version__, str(torch.version.cuda), str(torch.version.hip)]
        if device.type == "cuda":
            parts.append(torch.cuda.get_device_name(device))
        folder = Path(__file__).parent
        parts += [file.read_text() for file in sorted(folder.rglob("*.py"))]
    return hashlib.sha256("\n".join(parts).encode(errors="backslashreplace")).hexdigest()[:20]
