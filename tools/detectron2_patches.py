"""What is edited in the sources of Detectron2 v0.6 so that they run on today's libraries.

Each row replaces an exact text and states how often it occurs: a source file that differs from
the one the row was written for is an error, never a silent miss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


class PatchError(Exception):
    """The sources are not the ones the table was written for."""


@dataclass(frozen=True)
class Edit:
    """Replace `old` by `new`, `count` times, in `file` (path in the wheel)."""

    file: str
    old: str
    new: str
    count: int
    reason: str


STUB_TEXT = "pure-Python build of Detectron2"
STUB = f'''"""Stands where the compiled operators would be; the callers expect ImportError."""

raise ImportError(
    "detectron2._C is missing: this is the {STUB_TEXT} that focalnet_det installs. "
    "It lacks rotated boxes (ROIAlignRotated, nms_rotated, pairwise_iou_rotated) and the C++ COCO "
    "evaluation; torchvision supplies the rest. For those operators build Detectron2 from source."
)
'''

NO_NUMPY_ALIAS = "numpy >= 1.24 has no alias for the built-in type"
NO_COMPILED_OPS = "there are no compiled operators: import them where they are called"

MODEL_ZOO_OLD = """    cfg_file = pkg_resources.resource_filename(
        "detectron2.model_zoo", os.path.join("configs", config_path)
    )
"""
MODEL_ZOO_NEW = """    root = os.path.dirname(os.path.abspath(__file__))
    cfg_file = os.path.join(root, "configs", config_path)
"""

DEFORM_OLD = """deform_conv = _DeformConv.apply
modulated_deform_conv = _ModulatedDeformConv.apply
"""
DEFORM_NEW = '''def deform_conv(
    input,
    offset,
    weight,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    deformable_groups=1,
    im2col_step=64,
):
    """torchvision reads both group counts from the shapes of weight and offset."""
    return deform_conv2d(input, offset, weight, None, stride, padding, dilation)


def modulated_deform_conv(
    input,
    offset,
    mask,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    deformable_groups=1,
):
    """torchvision reads both group counts from the shapes of weight and offset."""
    return deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
'''

EXPORT_OLD = """from .api import *
from .flatten import TracingAdapter
"""
EXPORT_NEW = """try:
    from .api import *
except ImportError:  # caffe2 left PyTorch
    pass
from .flatten import TracingAdapter
"""

EDITS: tuple[Edit, ...] = (
    Edit(
        "detectron2/data/transforms/transform.py",
        "interp=Image.LINEAR",
        "interp=Image.BILINEAR",
        1,
        "Pillow >= 10 has no LINEAR",
    ),
    Edit(
        "detectron2/layers/deform_conv.py",
        "from detectron2 import _C\n\n",
        "",
        1,
        "there are no compiled operators: torchvision's is used below",
    ),
    Edit(
        "detectron2/layers/deform_conv.py",
        DEFORM_OLD,
        DEFORM_NEW,
        1,
        "torchvision has deformable convolution with gradients, on CPU and CUDA",
    ),
    Edit(
        "detectron2/layers/roi_align_rotated.py",
        "from detectron2 import _C\n\n",
        "",
        1,
        NO_COMPILED_OPS,
    ),
    Edit(
        "detectron2/layers/roi_align_rotated.py",
        "        output = _C.roi_align_rotated_forward(",
        "        from detectron2 import _C\n\n        output = _C.roi_align_rotated_forward(",
        1,
        NO_COMPILED_OPS,
    ),
    Edit(
        "detectron2/layers/roi_align_rotated.py",
        "        grad_input = _C.roi_align_rotated_backward(",
        "        from detectron2 import _C\n\n        grad_input = _C.roi_align_rotated_backward(",
        1,
        NO_COMPILED_OPS,
    ),
    Edit(
        "detectron2/layers/rotated_boxes.py",
        "from detectron2 import _C\n\n\n",
        "",
        1,
        NO_COMPILED_OPS,
    ),
    Edit(
        "detectron2/layers/rotated_boxes.py",
        "    return _C.box_iou_rotated(boxes1, boxes2)",
        "    from detectron2 import _C\n\n    return _C.box_iou_rotated(boxes1, boxes2)",
        1,
        NO_COMPILED_OPS,
    ),
    Edit(
        "detectron2/layers/nms.py",
        "    return torch.ops.detectron2.nms_rotated(boxes, scores, iou_threshold)",
        "    from detectron2 import _C  # noqa: registers the operator, or says what is missing\n\n"
        "    return torch.ops.detectron2.nms_rotated(boxes, scores, iou_threshold)",
        1,
        "say what is missing instead of '_OpNamespace has no attribute'",
    ),
    Edit(
        "detectron2/evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "try:\n"
        "    from detectron2.evaluation.fast_eval_api import COCOeval_opt\n"
        "except ImportError:\n"
        "    COCOeval_opt = COCOeval\n",
        1,
        "without compiled operators pycocotools evaluates",
    ),
    Edit("detectron2/data/build.py", "dtype=np.int\n", "dtype=int\n", 1, NO_NUMPY_ALIAS),
    Edit("detectron2/data/build.py", "dtype=np.int)", "dtype=int)", 1, NO_NUMPY_ALIAS),
    Edit(
        "detectron2/evaluation/sem_seg_evaluation.py",
        "dtype=np.int)",
        "dtype=int)",
        2,
        NO_NUMPY_ALIAS,
    ),
    Edit("detectron2/evaluation/sem_seg_evaluation.py", "np.float)", "float)", 5, NO_NUMPY_ALIAS),
    Edit("detectron2/evaluation/pascal_voc_evaluation.py", "np.bool)", "bool)", 2, NO_NUMPY_ALIAS),
    Edit("detectron2/structures/masks.py", "np.bool)", "bool)", 3, NO_NUMPY_ALIAS),
    Edit("detectron2/utils/visualizer.py", "np.bool)", "bool)", 3, NO_NUMPY_ALIAS),
    Edit("detectron2/utils/video_visualizer.py", "np.bool)", "bool)", 1, NO_NUMPY_ALIAS),
    Edit("detectron2/data/datasets/pascal_voc.py", "np.str)", "str)", 1, NO_NUMPY_ALIAS),
    Edit(
        "detectron2/layers/mask_ops.py",
        "np.array(mask, copy=False)",
        "np.asarray(mask)",
        1,
        "numpy 2 raises where copy=False needs a copy",
    ),
    Edit(
        "detectron2/data/common.py",
        "self._rng.sample(self._fallback_candidates, k=1)",
        "self._rng.sample(list(self._fallback_candidates), k=1)",
        1,
        "Python >= 3.11 does not sample from a set",
    ),
    Edit(
        "detectron2/engine/hooks.py",
        "torch.optim.lr_scheduler._LRScheduler",
        "torch.optim.lr_scheduler.LRScheduler",
        2,
        "torch >= 2.0: its own schedulers no longer derive from _LRScheduler and lost their state",
    ),
    Edit(
        "detectron2/export/__init__.py",
        EXPORT_OLD,
        EXPORT_NEW,
        1,
        "caffe2 left PyTorch; tracing and scripting do not need it",
    ),
    Edit(
        "detectron2/model_zoo/model_zoo.py",
        "import pkg_resources\n",
        "",
        1,
        "setuptools >= 82 has no pkg_resources",
    ),
    Edit(
        "detectron2/model_zoo/model_zoo.py",
        MODEL_ZOO_OLD,
        MODEL_ZOO_NEW,
        1,
        "setuptools >= 82 has no pkg_resources",
    ),
    Edit(
        "detectron2/engine/launch.py",
        '    assert torch.cuda.is_available(), "cuda is not available.'
        ' Please check your installation."\n',
        "    has_gpu = torch.cuda.is_available()\n",
        1,
        "several processes without a GPU, as later Detectron2 allows",
    ),
    Edit(
        "detectron2/engine/launch.py",
        'backend="NCCL"',
        'backend="NCCL" if has_gpu else "GLOO"',
        1,
        "several processes without a GPU, as later Detectron2 allows",
    ),
    Edit(
        "detectron2/engine/launch.py",
        "    assert num_gpus_per_machine <= torch.cuda.device_count()\n"
        "    torch.cuda.set_device(local_rank)\n",
        "    if has_gpu:\n"
        "        assert num_gpus_per_machine <= torch.cuda.device_count()\n"
        "        torch.cuda.set_device(local_rank)\n",
        1,
        "several processes without a GPU, as later Detectron2 allows",
    ),
    Edit(
        "detectron2/engine/defaults.py",
        '    if "device_ids" not in kwargs:\n',
        '    if "device_ids" not in kwargs and next(model.parameters()).is_cuda:\n',
        1,
        "DistributedDataParallel refuses device_ids for a model on the CPU",
    ),
    Edit(
        "detectron2/modeling/anchor_generator.py",
        "torch.meshgrid(shifts_y, shifts_x)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
        1,
        "torch warns without indexing",
    ),
    Edit(
        "detectron2/projects/panoptic_deeplab/post_processing.py",
        "        torch.arange(width, dtype=offsets.dtype, device=offsets.device),\n",
        "        torch.arange(width, dtype=offsets.dtype, device=offsets.device),\n"
        '        indexing="ij",\n',
        1,
        "torch warns without indexing",
    ),
)


def apply_edits(sources: Mapping[str, bytes], edits: tuple[Edit, ...] = EDITS) -> dict[str, bytes]:
    """Return the sources with every edit made.

    Args:
        sources: path in the wheel -> content.
        edits: rows to apply, in order.
    Raises: PatchError if a file is missing or a text does not occur as often as its row says.
    """
    edited = dict(sources)
    for edit in edits:
        if edit.file not in edited:
            raise PatchError(f"{edit.file} is missing from the archive ({edit.reason})")
        text = edited[edit.file].decode("utf-8")
        found = text.count(edit.old)
        if found != edit.count:
            raise PatchError(
                f"{edit.file} has {edit.old.strip()[:50]!r} {found} times instead of {edit.count}"
            )
        edited[edit.file] = text.replace(edit.old, edit.new).encode("utf-8")
    return edited
