"""The backbones need PyTorch alone."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys

from tests.helpers.paths import ROOT

# Run in a child process, whose finders do not find the blocked packages: not installed, that is.
BLOCK = """
import sys

BLOCKED = {"detectron2", "fvcore", "iopath", "omegaconf", "pycocotools", "cv2"}

class Hider:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hider(finder) for finder in sys.meta_path]
"""

USE = """
import json
import torch
import focalnet_det

with torch.no_grad():
    features = focalnet_det.create_backbone("focalnet_nano").eval()(torch.zeros(1, 3, 33, 47))
files = {
    name: getattr(module, "__file__", None) or ""
    for name, module in list(sys.modules.items()) if "." not in name
}
print(json.dumps({"shapes": {k: list(v.shape) for k, v in features.items()}, "files": files}))
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def distributions_behind(name: str) -> set[str]:
    """A distribution and all that it requires, as normalised names."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        plain = [line for line in requirements if "extra ==" not in line]
        waiting += [re.match(r"[\w.-]+", line)[0] for line in plain]
    return found


def test_importing_and_running_a_backbone_needs_torch_alone() -> None:
    result = run(USE)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["shapes"] == {
        "stage1": [1, 32, 9, 12],
        "stage2": [1, 64, 5, 6],
        "stage3": [1, 128, 3, 3],
        "stage4": [1, 256, 2, 2],
    }
    # torch takes these along where it finds them (tqdm in torch/hub.py), without requiring them.
    allowed = distributions_behind("torch") | {"numpy", "tqdm"}
    owners = importlib.metadata.packages_distributions()
    third_party = {
        name: {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners[name]}
        for name, file in report["files"].items()
        if "site-packages" in file and name in owners and name != "focalnet_det"
    }
    assert "torch" in third_party
    foreign = {name for name, owner in third_party.items() if not owner & allowed}
    # Installers of editable packages put finders of theirs into every interpreter.
    foreign = {name for name in foreign if not name.startswith(("__editable__", "_distutils_hack"))}
    assert foreign == set()


def test_the_blocked_packages_are_out_of_reach() -> None:
    """Else the other tests here would prove nothing."""
    result = run("import cv2" if importlib.util.find_spec("cv2") else "import fvcore")
    assert result.returncode == 1
    assert "ModuleNotFoundError" in result.stderr


def test_the_inner_rings_import_alone() -> None:
    result = run("from focalnet_det import analysis, backbones, layers, ops")
    assert result.returncode == 0, result.stderr


def test_what_needs_detectron2_says_how_to_get_it() -> None:
    result = run(
        "import focalnet_det\n"
        "try:\n    focalnet_det.add_focalnet_config(None)\n"
        "except ImportError as error:\n    print(error)\n"
    )
    assert result.returncode == 0, result.stderr
    assert "tools/install_detectron2.py" in result.stdout


def test_nothing_is_loaded_before_it_is_used() -> None:
    """Scripts print their help at once, and no model waits for the compiler."""
    code = """
import json
import focalnet_det
first = "torch" in sys.modules
focalnet_det.create_backbone("focalnet_nano")
print(json.dumps([first, "torch" in sys.modules, "torch._dynamo" in sys.modules]))
"""
    assert json.loads(run(code).stdout) == [False, True, False]


def test_unknown_name() -> None:
    done = run("import focalnet_det; focalnet_det.creat_backbone")
    assert "module 'focalnet_det' has no attribute 'creat_backbone'" in done.stderr
