"""Count parameters, multiply-accumulates and activation memory of a backbone by part."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ..backbones.stages import Stage, StagedBackbone
from ..ops.focal_block import policy

COUNTER = (
    "torch.utils.flop_counter, halved to multiply-accumulates: convolutions (padding taps "
    "included), linear layers and products of attention; not counted: biases, norms, activations, "
    "gates, means, residuals"
)


@dataclass(frozen=True)
class PartCost:
    """Cost of one part of a backbone.

    Attributes:
        name: ``patch_embed``, ``stageK`` (its blocks), ``downsampleK`` (what follows stage K) or
            ``normK`` (the output norm of stage K).
        parameters: number of weights, trainable or not.
        macs: multiply-accumulates of one forward pass of the whole batch.
        activation_bytes: tensors saved for the backward pass by the fused backends, excluding
            parameters; tensors shared by several parts count for the first.
        reference_activation_bytes: the same for the reference backend, the fallback without fused
            kernels, see :mod:`focalnet_det.ops.focal_block.policy`.
        output_shape: (N, H, W, C).
    """

    name: str
    parameters: int
    macs: int
    activation_bytes: int
    reference_activation_bytes: int
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class BackboneCost:
    """Cost of a backbone at one input size; the totals are sums over ``parts``."""

    size: tuple[int, int]
    batch_size: int
    parts: tuple[PartCost, ...]
    counter: str = COUNTER

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(part.parameters for part in self.parts)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass, what papers call FLOPs."""
        return sum(part.macs for part in self.parts)

    @property
    def activation_bytes(self) -> int:
        """Estimated size of the tensors saved between forward and backward pass."""
        return sum(part.activation_bytes for part in self.parts)

    @property
    def reference_activation_bytes(self) -> int:
        """The same for the reference backend."""
        return sum(part.reference_activation_bytes for part in self.parts)


def analyze_backbone(
    net: StagedBackbone, size: tuple[int, int] = (224, 224), *, batch_size: int = 1
) -> BackboneCost:
    """Analyze a backbone on the meta device, without computing anything.

    Activation memory depends on the mode, frozen stages, checkpointing and parameter dtype of
    ``net``. It excludes kernel workspaces and, with checkpointing, the block being recomputed.

    Args:
        net: backbone; not modified.
        size: (height, width) of the input, pixels.
        batch_size: images.
    Raises: ValueError if a number is not positive.
    """
    if min(*size, batch_size) < 1:
        raise ValueError(f"Size and batch size must be positive, got {size} and {batch_size}.")
    # Fused operators are opaque to the counter, so MACs are taken from the reference backend.
    reference, fused = (_record(net, size, batch_size, path) for path in ("reference", "torch"))
    return BackboneCost(
        size=size,
        batch_size=batch_size,
        parts=tuple(
            PartCost(
                name=name,
                parameters=_own_parameters(module),
                macs=reference.macs[name],
                activation_bytes=fused.saved[name],
                reference_activation_bytes=reference.saved[name],
                output_shape=reference.shapes[name],
            )
            for name, module in _parts(net).items()
        ),
    )


def _record(net: StagedBackbone, size: tuple[int, int], batch_size: int, path: str) -> "_Recorder":
    recorder = _Recorder(net)
    parameters: dict[str, torch.Tensor] = {
        name: nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for name, parameter in net.named_parameters()
    }
    recorder.exclude(parameters.values())
    dtype = next(net.parameters()).dtype
    x = torch.empty(batch_size, net.patch_embed.proj.in_channels, *size, device="meta", dtype=dtype)
    arguments = (x, [size] * batch_size) if net.valid_context else (x,)
    forced, watched = policy.force_backend(path), recorder.watch(_parts(net))
    with torch.enable_grad(), torch.device("meta"), forced, watched:
        functional_call(net, parameters, arguments)
    return recorder


def component_parameters(model: nn.Module) -> dict[str, int]:
    """Count the parameters of each direct child of a model; shared ones count for the first."""
    seen: set[nn.Parameter] = set()
    counts: dict[str, int] = {}
    for name, child in model.named_children():
        new = set(child.parameters()) - seen
        counts[name] = sum(parameter.numel() for parameter in new)
        seen |= new
    return {name: count for name, count in counts.items() if count}


def _parts(net: StagedBackbone) -> dict[str, nn.Module]:
    """Return the parts by name, in the order of the forward pass."""
    parts: dict[str, nn.Module] = {"patch_embed": net.patch_embed}
    for i, (name, layer) in enumerate(zip(net.stage_names, net.layers, strict=True)):
        number = name.removeprefix("stage")
        parts[name] = layer
        if net.output_norm and name in net.out_features:
            parts[f"norm{number}"] = cast(nn.Module, getattr(net, f"norm{i}"))
        downsample = cast(Stage, layer).downsample
        if downsample is not None:
            parts[f"downsample{number}"] = downsample
    return parts


def _own_parameters(module: nn.Module) -> int:
    """Count the parameters of a part; of a stage, those of its blocks without downsampling."""
    counted: nn.Module = module.blocks if isinstance(module, Stage) else module
    return sum(int(parameter.numel()) for parameter in counted.parameters())


class _Recorder:
    """Recorder that attributes work and saved tensors to the currently running part."""

    def __init__(self, net: StagedBackbone) -> None:
        names = list(_parts(net))
        self.macs = dict.fromkeys(names, 0)
        self.saved = dict.fromkeys(names, 0)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.current = names[0]
        # Holding references, because addresses of freed storages are reused.
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.counter = FlopCounterMode(display=False)

    def exclude(self, tensors: Any) -> None:
        """Ignore the storages of these tensors."""
        for tensor in tensors:
            self._is_new(tensor)

    @contextmanager
    def watch(self, parts: dict[str, nn.Module]) -> Iterator[None]:
        """Record the forward pass within the context."""
        with ExitStack() as stack:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._save, _no_backward))
            stack.enter_context(self.counter)
            for name, module in parts.items():
                for handle in (
                    module.register_forward_pre_hook(self._enter(name)),
                    module.register_forward_hook(self._leave(name)),
                ):
                    stack.callback(handle.remove)
            yield

    def _enter(self, name: str) -> Any:
        def hook(*_: Any) -> None:
            self.current = name
            self.macs[name] -= self.counter.get_total_flops() // 2

        return hook

    def _leave(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self.macs[name] += self.counter.get_total_flops() // 2
            self.shapes[name] = tuple(output.shape)

        return hook

    def _save(self, tensor: Tensor) -> None:
        if self._is_new(tensor):
            self.saved[self.current] += tensor.untyped_storage().nbytes()

    def _is_new(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        new = storage._cdata not in self.storages
        self.storages[storage._cdata] = storage
        return new


def _no_backward(_: None) -> Tensor:
    raise RuntimeError("This forward pass was only recorded for analysis; it has no backward pass.")
