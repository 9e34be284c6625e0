"""Mirror the structs that the functions of ``csrc`` take: each call passes one of them.

Pointers are addresses of tensors or null, numbers are C ``long``, reals C ``float``. Field names
and their order are those of the sources, which say what they mean.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

from torch import Tensor

MOST_LEVELS = 8


class Affine(ctypes.Structure):
    """Weight and bias of a layer, or gradients with respect to them."""

    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class Engines(ctypes.Structure):
    """Engines of the three products of a layer, see :mod:`.products`."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("forward", "input", "weight"))


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


def _struct(pointers: str, numbers: str, reals: str = "") -> type[ctypes.Structure]:
    fields = [
        *_fields(ctypes.c_void_p, pointers),
        *_fields(ctypes.c_long, numbers),
        *_fields(ctypes.c_float, reals),
    ]
    return type("Call", (ctypes.Structure,), {"_fields_": fields})


# By the name of the function without its prefix.
CALLS: dict[str, type[ctypes.Structure]] = {
    "depthwise": _struct("x kernel valid before after", "n h w c size flip threads sixteen"),
    "depthwise_weight": _struct("x gradient out", "n h w c size threads sixteen"),
    "gelu": _struct("x bias valid out", "rows c threads sixteen"),
    "level_backward": _struct(
        "grad_sum gates grad_after before valid out", "rows c pitch repeat threads sixteen"
    ),
    "gelu_pair": _struct("before bias gradient after grad_bias", "rows c threads sixteen"),
    "residual": _struct("branch x bias factors", "rows c repeat threads sixteen"),
    "gate": _struct("query query_bias modulator bias out", "rows c threads sixteen"),
    "gate_backward": _struct(
        "gradient query query_bias modulator bias grad_query sums", "rows c threads sixteen"
    ),
    "norm": _struct("x weight bias out statistics", "rows c threads sixteen", "eps"),
    "norm_backward": _struct(
        "gradient x weight statistics residual grad_x grad_weight grad_bias",
        "rows c threads sixteen",
    ),
    "gated_sum": _struct(
        "contexts shared gates total", "rows c levels repeat backward threads sixteen"
    ),
    "product": _struct("a b out", "a_width b_width a_turned b_turned m n k add threads"),
}


class Branch(ctypes.Structure):
    """Arguments that both branches of a block share in training."""

    _fields_ = (
        *_fields(ctypes.c_void_p, "x factors gradient out"),
        *_fields(Affine, "norm grad_norm"),
        *_fields(ctypes.c_long, "n h w c threads"),
        ("eps", ctypes.c_float),
    )


class ModulationCall(ctypes.Structure):
    """Focal modulation in training."""

    _fields_ = (
        ("call", Branch),
        *_fields(Affine, "f h proj grad_f grad_h grad_proj"),
        *_fields(Engines, "square narrow"),
        *_fields(ctypes.c_void_p * MOST_LEVELS, "kernels grad_kernels"),
        *_fields(ctypes.c_void_p, "query context modulator"),
        ("before", ctypes.c_void_p * MOST_LEVELS),
        ("sizes", ctypes.c_long * MOST_LEVELS),
        ("levels", ctypes.c_long),
        ("divisor", ctypes.c_float),
    )


class MlpCall(ctypes.Structure):
    """The MLP in training."""

    _fields_ = (
        ("call", Branch),
        *_fields(Affine, "fc1 fc2 grad_fc1 grad_fc2"),
        *_fields(Engines, "fc1_engines fc2_engines"),
        ("hidden", ctypes.c_void_p),
        ("width", ctypes.c_long),
    )


class Block(ctypes.Structure):
    """A whole block in inference."""

    _fields_ = (
        *_fields(
            ctypes.c_void_p,
            "x out valid f_weight h_weight proj_weight fc1_weight fc2_weight norm1_weight "
            "norm1_bias f_bias h_bias proj_bias ln_weight ln_bias gamma1 norm2_weight norm2_bias "
            "fc1_bias fc2_bias gamma2",
        ),
        ("kernels", ctypes.c_void_p * MOST_LEVELS),
        ("sizes", ctypes.c_long * MOST_LEVELS),
        *_fields(
            ctypes.c_long,
            "sixteen_maps sixteen_products n h w c hidden levels post_norm threads",
        ),
        *_fields(ctypes.c_float, "norm1_eps ln_eps norm2_eps divisor"),
    )


class Pyramid(ctypes.Structure):
    """RoIAlign from the maps of a pyramid."""

    _fields_ = (
        ("maps", ctypes.c_void_p * MOST_LEVELS),
        ("scales", ctypes.c_float * MOST_LEVELS),
        ("heights", ctypes.c_long * MOST_LEVELS),
        ("widths", ctypes.c_long * MOST_LEVELS),
        *_fields(ctypes.c_void_p, "boxes levels out"),
        *_fields(ctypes.c_long, "count c size ratio aligned threads"),
    )


def address(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's values, None for null."""
    return None if tensor is None else tensor.data_ptr()


def affine(tensors: Sequence[Tensor]) -> Affine:
    """Return the addresses of a weight and a bias."""
    return Affine(tensors[0].data_ptr(), tensors[1].data_ptr())
