"""Map former module names, so that old imports and the configs of old runs keep working."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence

PACKAGE = "focalnet_det."
# Former name -> current name, both without the package. Where a package now has the name of a
# former module, imports must be changed, but saved configs are still read.
MOVED_MODULES = {
    "analysis.detector_speed": "benchmark.detector_speed",
    "analysis.detectors": "benchmark.recipe_models",
    "analysis.evaluation_speed": "benchmark.evaluation_speed",
    "analysis.gpu_code": "benchmark.gpu_code",
    "analysis.gpu_suite": "benchmark.gpu_suite",
    "analysis.padding": "analysis.feature_shifts",
    "analysis.peers": "benchmark.contenders",
    "analysis.segmentor": "analysis.segmentor_flops",
    "analysis.speed": "benchmark.backbone_speed",
    "backbones.d2": "detectron2.backbone",
    "backbones.focal_attention": "backbones.attention",
    "checkpoint.detectors": "checkpoint.layouts.detectors",
    "checkpoint.focal_transformer": "checkpoint.layouts.focal_transformer_names",
    "checkpoint.formats": "checkpoint.reader.formats",
    "checkpoint.growth": "checkpoint.global_level",
    "checkpoint.layouts": "checkpoint.layouts.tables",
    "checkpoint.peers": "checkpoint.layouts.swin_resnet",
    "checkpoint.pickled": "checkpoint.reader.pickled",
    "checkpoint.raw": "checkpoint.reader.raw",
    "checkpoint.shapes": "checkpoint.tensor_shapes",
    "checkpoint.translate": "checkpoint.layouts.translate",
    "checkpoint.unpickle": "checkpoint.reader.unpickle",
    "config": "experiment.yacs_keys",
    "data.ade20k": "data.semantic.ade20k",
    "data.ade20k_colors": "data.semantic.ade20k_colors",
    "data.ade20k_objects": "data.panoptic.ade20k_objects",
    "data.build": "data.loader",
    "data.check": "data.check_dataset",
    "data.coco_panoptic": "data.panoptic.coco_panoptic",
    "data.copy_paste": "data.instances.copy_paste",
    "data.datasets": "data.registry",
    "data.doctor.coco": "data.doctor.coco_doctor",
    "data.doctor.folders": "data.doctor.folder_doctor",
    "data.doctor.pictures": "data.doctor.image_checks",
    "data.io.coco": "data.io.coco_files",
    "data.io.coco_suspicions": "data.io.box_format",
    "data.io.faults": "data.io.issues",
    "data.io.pictures": "data.io.open_image",
    "data.labels": "data.io.labels",
    "data.mappers": "data.instances.mappers",
    "data.panoptic": "data.panoptic.segments",
    "data.panoptic_sets": "data.panoptic.panoptic_sets",
    "data.reading": "data.io.read_image",
    "data.semantic": "data.semantic.label_folders",
    "data.semantic_augmentation": "data.semantic.semantic_crops",
    "data.shapes": "data.shapes.generate",
    "data.shapes_export": "data.shapes.export",
    "data.shapes_scene": "data.shapes.scene",
    "data.shapes_textures": "data.shapes.textures",
    "data.tally": "data.issue_policies",
    "data.verify": "data.doctor.findings",
    "data.verify_panoptic": "data.doctor.panoptic_doctor",
    "data.writing": "data.io.write_image",
    "engine.experiment": "experiment.description",
    "engine.padding": "engine.padding_robustness",
    "engine.pictures": "engine.run_pictures",
    "engine.solver": "experiment.solver",
    "evaluation.boundary": "evaluation.boundary_ap",
    "evaluation.build": "evaluation.evaluators",
    "evaluation.coco": "evaluation.coco_ap",
    "evaluation.panoptic": "evaluation.panoptic_quality",
    "evaluation.semantic": "evaluation.semantic_iou",
    "evaluation.tables": "evaluation.score_tables",
    "heads.build": "heads.segmentors",
    "heads.cascade": "heads.mmdet.cascade",
    "heads.mmdet_conventions": "heads.mmdet.conventions",
    "heads.mmdet_rcnn": "heads.mmdet.rcnn",
    "heads.segmentor": "heads.mmdet.segmentor",
    "layers.hooks": "layers.module_hooks",
    "layers.norm": "layers.memory_format",
    "ops.dispatch": "ops.focal_block.policy",
    "ops.fused": "ops.focal_block.autograd",
    "ops.kernels": "ops.focal_block",
    "ops.kernels.capabilities": "ops.cpu.capabilities",
    "ops.kernels.depthwise": "ops.focal_block.pytorch.depthwise",
    "ops.kernels.inference": "ops.focal_block.pytorch.inference",
    "ops.kernels.native": "ops.cpu.library",
    "ops.kernels.native_build": "ops.cpu.library_build",
    "ops.kernels.native_cache": "ops.cpu.library_cache",
    "ops.kernels.native_inference": "ops.focal_block.cpu.native_inference",
    "ops.kernels.native_training": "ops.focal_block.cpu.native_training",
    "ops.kernels.parameters": "ops.focal_block.weights",
    "ops.kernels.patches": "ops.cpu.patches",
    "ops.kernels.steps": "ops.focal_block.pytorch.steps",
    "ops.kernels.tiles": "ops.focal_block.pytorch.tiles",
    "ops.kernels.training": "ops.focal_block.pytorch.training",
    "ops.kernels.triton_block": "ops.focal_block.triton.triton_block",
    "ops.kernels.triton_common": "ops.focal_block.triton.triton_common",
    "ops.kernels.triton_deformable": "ops.deformable.triton_deformable",
    "ops.kernels.triton_depthwise": "ops.focal_block.triton.triton_depthwise",
    "ops.kernels.triton_gradients": "ops.focal_block.triton.triton_gradients",
    "ops.kernels.triton_launch": "ops.focal_block.triton.triton_launch",
    "ops.kernels.triton_linear": "ops.focal_block.triton.triton_linear",
    "ops.kernels.triton_mlp": "ops.focal_block.triton.triton_mlp",
    "ops.kernels.triton_norm": "ops.focal_block.triton.triton_norm",
    "ops.kernels.triton_pointwise": "ops.focal_block.triton.triton_pointwise",
    "ops.kernels.triton_prepared": "ops.focal_block.triton.triton_prepared",
    "report.build": "report.write_report",
    "report.detection": "report.detection_section",
    "report.semantic": "report.semantic_section",
    "visualization.keys": "visualization.visible_tokens",
    "visualization.panoptic": "visualization.draw_panoptic",
    "visualization.predictions": "visualization.draw_instances",
    "visualization.semantic": "visualization.draw_semantic",
}


def current_name(name: str) -> str:
    """Return the current qualified name of a class or function; unknown names are unchanged."""
    module, _, member = name.removeprefix(PACKAGE).rpartition(".")
    if not name.startswith(PACKAGE) or module not in MOVED_MODULES:
        return name
    return f"{PACKAGE}{MOVED_MODULES[module]}.{member}"


class MovedModuleFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import a module by its former name, with a DeprecationWarning that gives the current one."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: types.ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a spec for the former name of a module, None for any other module."""
        if fullname.removeprefix(PACKAGE) not in MOVED_MODULES or not fullname.startswith(PACKAGE):
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: types.ModuleType) -> None:
        """Import the current module and register it under the former name too."""
        old = module.__name__
        new = PACKAGE + MOVED_MODULES[old.removeprefix(PACKAGE)]
        warnings.warn(f"{old} is now {new}.", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)


def find_moved_modules() -> None:
    """Install the import hook for former module names of this package; do so only once."""
    if not any(isinstance(finder, MovedModuleFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedModuleFinder())
