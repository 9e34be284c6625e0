"""Run a branch of a block in training in one call of the C++ kernels, float32.

The calls are those of ``csrc/modulation_branch.h`` and ``csrc/mlp_branch.h``, forward or backward,
with the norm before the branch and the residual sum after it.
"""

import ctypes
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ...cpu import products, structs
from ...cpu.library import Library, library
from ..pytorch.training import Residual, keeps_modulator
from ..weights import Affine, MlpWeights, ModulationWeights, flatten_mlp, flatten_modulation


class BranchCall:
    """A branch, or its backward pass.

    Args:
        x: (N, H, W, C), input of the branch.
        residual: factors of the branch.
        parameters: of the norm first, then of the branch.
        kept: tensors that the forward pass writes and the backward pass reads.
        gradient: by the sum of branch and input; None forward.

    Attributes:
        out: the sum; backward, the gradient by ``x``.
        kept: see Args.
        gradients: by the parameters, float32; empty forward.
    """

    def __init__(
        self,
        x: Tensor,
        residual: Residual,
        parameters: Sequence[Tensor],
        kept: list[Tensor],
        gradient: Tensor | None,
    ) -> None:
        self.x, self.kept = x.contiguous(), kept
        self.parameters = [p.float().contiguous() for p in parameters]
        self.gradient = None if gradient is None else gradient.contiguous()
        self.factors = None if residual.factors is None else residual.factors.contiguous()
        self.out = torch.empty_like(self.x)
        # Gradients that a forward pass does not write need an address all the same.
        self.gradients = [] if gradient is None else [torch.empty_like(p) for p in self.parameters]
        self._kept = [tensor.contiguous() for tensor in kept]

    @property
    def rows(self) -> int:
        """Return the number of pixels."""
        return self.x.shape[:-1].numel()

    def _call(self, eps: float) -> structs.Branch:
        call = structs.Branch(
            x=self.x.data_ptr(), out=self.out.data_ptr(), factors=structs.address(self.factors),
            gradient=structs.address(self.gradient), eps=eps, threads=torch.get_num_threads(),
        )  # fmt: skip
        call.n, call.h, call.w, call.c = self.x.shape
        call.norm = structs.affine(self.parameters[:2])
        if self.gradients:
            call.grad_norm = structs.affine(self.gradients[:2])
        return call

    def _layers(self, call: ctypes.Structure, *names: str) -> None:
        for i, name in enumerate(names):
            own = slice(2 + 2 * i, 4 + 2 * i)
            setattr(call, name, structs.affine(self.parameters[own]))
            if self.gradients:
                setattr(call, f"grad_{name}", structs.affine(self.gradients[own]))


def modulation(
    x: Tensor,
    norm: Affine,
    weights: ModulationWeights,
    residual: Residual,
    kept: list[Tensor],
    gradient: Tensor | None = None,
) -> BranchCall:
    """Run focal modulation, or, with ``gradient``, its backward pass.

    Args and result: see :class:`BranchCall`; ``kept`` as ``training.modulation_kept`` lists it.
    """
    run = BranchCall(x, residual, flatten_modulation(norm, weights)[0], kept, gradient)
    levels, c = len(weights.kernels), x.shape[-1]
    call = structs.ModulationCall(
        call=run._call(norm.eps), levels=levels, divisor=weights.divisor,
        square=products.native_engines(run.rows, c, c),
        narrow=products.native_engines(run.rows, levels + 1, c),
    )  # fmt: skip
    run._layers(call, "f", "h", "proj")
    addresses: list[int | None] = [tensor.data_ptr() for tensor in run._kept]
    call.query, call.context, *rest = addresses
    if keeps_modulator(weights.kernels):
        call.modulator, rest[0] = rest[0], None
    for level in range(levels):
        call.before[level], call.sizes[level] = rest[level], weights.kernels[level].shape[-1]
        call.kernels[level] = run.parameters[8 + level].data_ptr()
        if run.gradients:
            call.grad_kernels[level] = run.gradients[8 + level].data_ptr()
    cast(Library, library()).run("modulation", call)
    return run


def mlp(
    x: Tensor,
    norm: Affine,
    weights: MlpWeights,
    residual: Residual,
    kept: list[Tensor],
    gradient: Tensor | None = None,
) -> BranchCall:
    """Run the MLP, or, with ``gradient``, its backward pass.

    Args and result: see :class:`BranchCall`; ``kept`` as ``training.mlp_kept`` lists it.
    """
    run = BranchCall(x, residual, flatten_mlp(norm, weights)[0], kept, gradient)
    width, c = weights.fc1.weight.shape
    call = structs.MlpCall(
        call=run._call(norm.eps), hidden=run._kept[0].data_ptr(), width=width,
        fc1_engines=products.native_engines(run.rows, width, c),
        fc2_engines=products.native_engines(run.rows, c, width),
    )  # fmt: skip
    run._layers(call, "fc1", "fc2")
    cast(Library, library()).run("mlp", call)
    return run
