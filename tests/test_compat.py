"""Shims for the Detectron2 that a user brought, on stand-ins for what differs."""

import dataclasses
import importlib
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from focalnet_det import compat


def add_module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture(autouse=True)
def _fresh() -> None:
    compat.require_detectron2.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Put a package named detectron2 with the given data/build.py in front of any other."""
    loaded = take_out_detectron2()

    def write(build: str) -> Path:
        package = tmp_path / "detectron2"
        (package / "data").mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "data" / "build.py").write_text(build)
        monkeypatch.syspath_prepend(str(tmp_path))
        return package

    yield write
    take_out_detectron2()
    sys.modules.update(loaded)


def take_out_detectron2() -> dict[str, types.ModuleType]:
    """Forget every loaded module of Detectron2; returns them."""
    names = [name for name in sys.modules if name.split(".")[0] == "detectron2"]
    return {name: sys.modules.pop(name) for name in names}


def test_import_needs_neither_torch_nor_detectron2() -> None:
    code = (
        "import runpy, sys\n"
        f"runpy.run_path({compat.__file__!r})\n"
        "print(sorted({'torch', 'detectron2', 'numpy', 'PIL'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n"


# require_detectron2


def test_absent_detectron2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"make install.*tools/install_detectron2\.py"):
        compat.require_detectron2()


def test_a_clone_beside_the_script_is_not_detectron2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert compat.package_folder("only_a_folder") is None


def test_unedited_v06_on_a_numpy_without_aliases(
    install: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = install("histogram = np.zeros((3,), dtype=np.int)\n")
    with pytest.raises(ImportError, match=r"v0\.6 in .*--force") as error:
        compat.require_detectron2()
    assert str(folder) in str(error.value)


def test_unedited_v06_on_an_old_numpy(
    install: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("histogram = np.zeros((3,), dtype=np.int)\n")
    add_module(monkeypatch, "numpy", int=int)
    compat.require_detectron2()


@pytest.mark.parametrize("build", ["dtype=int", "dtype=np.int64", "x = np.integer"])
def test_edited_v06_and_main_are_accepted(build: str, install: Callable[[str], Path]) -> None:
    install(build)
    compat.require_detectron2()


# shims


def test_pillow_without_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    image = types.SimpleNamespace(BILINEAR=2)
    add_module(monkeypatch, "PIL", Image=image)
    compat.fill_pillow_linear()
    assert image.LINEAR == 2


def test_pillow_with_linear_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    image = types.SimpleNamespace(BILINEAR=2, LINEAR=7)
    add_module(monkeypatch, "PIL", Image=image)
    compat.fill_pillow_linear()
    assert image.LINEAR == 7


MODEL_ZOO = """
import pkg_resources
def config(name):
    return pkg_resources.resource_filename("detectron2.model_zoo", name)
"""


@pytest.fixture
def model_zoo(install: Callable[[str], Path]) -> Path:
    zoo = install("") / "model_zoo"
    zoo.mkdir()
    (zoo / "__init__.py").write_text(MODEL_ZOO)
    return zoo


def test_model_zoo_without_pkg_resources(model_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "pkg_resources" else find(n)
    )
    monkeypatch.delitem(sys.modules, "pkg_resources", raising=False)
    compat.import_model_zoo()
    zoo = importlib.import_module("detectron2.model_zoo")
    assert zoo.config("configs/a.yaml") == str(model_zoo / "configs" / "a.yaml")
    assert "pkg_resources" not in sys.modules
    compat.import_model_zoo()


def test_model_zoo_with_pkg_resources(model_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = add_module(monkeypatch, "pkg_resources", resource_filename=lambda *_: "real")
    compat.import_model_zoo()
    assert "detectron2.model_zoo" not in sys.modules  # imported only where it needs help
    assert importlib.import_module("detectron2.model_zoo").config("a") == "real"
    assert sys.modules["pkg_resources"] is real


def test_resource_of_an_unknown_package() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        compat.resource_filename("no_such_package", "a")


class Recorder:
    """create_ddp_model of v0.6 and main: adds the GPU number unless told device_ids."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, _: Any, *, fp16_compression: bool = False, **kwargs: Any) -> str:
        if "device_ids" not in kwargs:
            kwargs["device_ids"] = [0]
        self.calls.append({"fp16_compression": fp16_compression, **kwargs})
        return "wrapped"


def test_ddp_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    add_module(monkeypatch, "detectron2.engine.defaults", create_ddp_model=recorder)
    wrapper = compat.create_ddp_model
    on_gpu = types.SimpleNamespace(parameters=lambda: [types.SimpleNamespace(is_cuda=True)])
    assert wrapper(torch.nn.Linear(2, 2), broadcast_buffers=False) == "wrapped"
    wrapper(on_gpu, fp16_compression=True)
    wrapper(torch.nn.Linear(2, 2), device_ids=[3])
    assert recorder.calls == [
        {"fp16_compression": False, "broadcast_buffers": False, "device_ids": None},
        {"fp16_compression": True, "device_ids": [0]},
        {"fp16_compression": False, "device_ids": [3]},
    ]


def test_only_the_scripting_warning_is_silenced() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compat.silence_import_warnings()
        warnings.warn("`torch.jit.script` is deprecated. Use", FutureWarning, stacklevel=1)
        warnings.warn("something else is deprecated", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["something else is deprecated"]


# main's API


@dataclasses.dataclass
class MainShapeSpec:
    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


class MainImageList:
    """Records what it is asked; the signature is main's."""

    @staticmethod
    def from_tensors(
        tensors: list[Any],
        size_divisibility: int = 0,
        pad_value: float = 0.0,  # noqa: ARG004  (main's signature)
        padding_constraints: dict[str, int] | None = None,
    ) -> tuple[int, int, dict[str, int] | None]:
        return len(tensors), size_divisibility, padding_constraints


def test_feature_shape_in_main(monkeypatch: pytest.MonkeyPatch) -> None:
    add_module(monkeypatch, "detectron2.layers", ShapeSpec=MainShapeSpec)
    assert compat.feature_shape(96, 4) == MainShapeSpec(channels=96, stride=4)


def test_image_list_in_main(monkeypatch: pytest.MonkeyPatch) -> None:
    add_module(monkeypatch, "detectron2.structures", ImageList=MainImageList)
    images = [torch.zeros(3, 20, 30), torch.zeros(3, 40, 10)]
    assert compat.has_padding_constraints()
    square = {"square_size": 64}
    assert compat.make_image_list(images, 32, square) == (2, 32, square)
    assert compat.make_image_list(images, 32) == (2, 32, {})
    with pytest.raises(ValueError, match="a side of 40 pixels, but the backbone accepts"):
        compat.make_image_list(images, 32, {"square_size": 39})


# the installed Detectron2, whichever it is


@pytest.mark.parametrize(
    ("divisibility", "constraints", "expected"),
    [
        (0, None, (40, 30)),
        (32, None, (64, 32)),
        (32, {"size_divisibility": 16}, (48, 32)),
        (0, {"square_size": 50}, (50, 50)),
        (32, {"square_size": 50}, (64, 64)),
        (32, {"square_size": 40}, (64, 64)),
    ],
)
def test_image_list_pads_right_and_bottom(
    divisibility: int, constraints: dict[str, int] | None, expected: tuple[int, int]
) -> None:
    pytest.importorskip("detectron2")
    images = [torch.rand(3, 20, 30) + 1, torch.rand(3, 40, 10) + 1]
    batch = compat.make_image_list(images, divisibility, constraints)
    wanted = torch.zeros(2, 3, *expected)
    for row, image in zip(wanted, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    assert torch.equal(batch.tensor, wanted)
    assert [tuple(size) for size in batch.image_sizes] == [(20, 30), (40, 10)]


def test_feature_shape_of_the_installed_detectron2() -> None:
    pytest.importorskip("detectron2")
    shape = compat.feature_shape(channels=96, stride=4)
    assert (shape.channels, shape.stride) == (96, 4)


def test_shims_patch_nothing_of_the_installed_detectron2() -> None:
    pytest.importorskip("detectron2")
    compat.apply_shims()
    from detectron2.engine import defaults
    from detectron2.structures import ImageList

    for function in (defaults.create_ddp_model, ImageList.__init__):
        assert function.__module__ in ("detectron2.engine.defaults", ImageList.__module__)
        assert not hasattr(function, "__wrapped__")
    model = torch.nn.Linear(2, 2)
    assert compat.create_ddp_model(model) is model  # one process: nothing to wrap
