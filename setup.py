"""Package metadata. Detectron2 is installed apart: see tools/install_detectron2.py."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "focalnet_det/__init__.py").read_text(), re.M)
assert VERSION is not None
EXPORT = ["onnx>=1.19", "onnxscript>=0.7", "onnxruntime>=1.23"]


class BuildWithResources(build_py):
    """Put configs, tools and dataset scripts into the wheel: see focalnet_det/resources.py."""

    def run(self) -> None:
        """Build the package; a checkout that is installed with --editable keeps its folders."""
        super().run()
        if self.editable_mode:
            return
        for name in ("configs", "tools", "datasets"):
            for source in (ROOT / name).rglob("*"):
                if source.suffix in (".py", ".yaml", ".md", ".sh"):
                    target = Path(self.build_lib, "focalnet_det", source.relative_to(ROOT))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)


setup(
    name="focalnet_det",
    version=VERSION.group(1),
    description="FocalNet backbones for detection and segmentation with Detectron2",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    cmdclass={"build_py": BuildWithResources},
    entry_points={"console_scripts": ["focalnet-det = focalnet_det.command_line:main"]},
    packages=find_packages(include=["focalnet_det", "focalnet_det.*"]),
    package_data={
        "focalnet_det": [
            *("py.typed", "ops/cpu/csrc/*.cpp", "ops/cpu/csrc/*.h"),
            "data/classification/imagenet22k_synsets.txt",
        ]
    },
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "numpy>=1.24",
        "pillow>=9.1",
        "safetensors>=0.4.3",
        "fvcore>=0.1.5,<0.1.6",
        "iopath>=0.1.9,<0.2",
        "omegaconf>=2.1,<2.4",
        "hydra-core>=1.1,<1.4",
        "yacs>=0.1.8",
        "cloudpickle",
        "tabulate",
        "termcolor>=1.1",
        "tqdm",
        "pycocotools>=2.0.7",
        "hotcoco>=1.3,<2",
        "opencv-python-headless",
        "scipy>=1.9",
        "shapely",
        "matplotlib",
        "tensorboard",
        "rich",
    ],
    extras_require={
        "serve": ["gradio>=6.31,<7"],
        "video": ["av>=12"],
        "export": EXPORT,
        "docs": ["zensical==0.1.3"],
        "classification": ["timm>=1.0.9"],
        "huggingface": ["transformers>=5,<6"],
        "test": [
            *EXPORT,
            "av>=12",
            "pytest>=8",
            "pytest-xdist",
            "hypothesis>=6",
            "timm>=1.0.9",
            "transformers>=4.57,<6",
            "ruff",
            "mypy",
        ],
    },
)
