"""Check a yacs config for invalid values and keys that nothing reads."""

from collections.abc import ItemsView, ValuesView
from typing import Any, get_type_hints

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from torch import nn

from ..detectron2.backbone import CONFIG_NODES, is_c4
from ..detectron2.feature_shapes import C4_ADVICE
from . import yacs
from .rules import YACS_RULES, range_problem
from .values import fits, type_name
from .yacs_parts import build_optimizer, model_config, test_arguments, train_arguments


def problems(cfg: CfgNode) -> list[str]:
    """Describe invalid values."""
    found = []
    for key, name in YACS_RULES.items():
        if problem := range_problem(key, name, value_of(cfg, key)):
            found.append(problem)
    means, stds = len(cfg.MODEL.PIXEL_MEAN), len(cfg.MODEL.PIXEL_STD)
    if means != stds:
        found.append(
            f"MODEL.PIXEL_MEAN has {means} values, but MODEL.PIXEL_STD has {stds}: give both one "
            "value per channel."
        )
    if cfg.MODEL.BACKBONE.NAME not in BACKBONE_REGISTRY:
        known = ", ".join(sorted(name for name, _ in BACKBONE_REGISTRY if "focal" in name))
        found.append(
            f"Unknown MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME!r}. Of this package: {known}."
        )
    elif "focal" in cfg.MODEL.BACKBONE.NAME and is_c4(cfg):
        found.append(f"MODEL.ROI_HEADS.NAME is Res5ROIHeads. {C4_ADVICE}")
    names = cfg.SOLVER.NO_DECAY_NAMES
    if not all(isinstance(name, str) for name in names):
        found.append(f"SOLVER.NO_DECAY_NAMES must be a list of strings, got {list(names)}.")
    return found + [problem for name in CONFIG_NODES for problem in backbone_problems(cfg, name)]


def backbone_problems(cfg: CfgNode, node: str) -> list[str]:
    """Describe invalid values in ``MODEL.FOCALNET`` or ``MODEL.FOCAL_TRANSFORMER``."""
    # Their default is None, so yacs does not check the types.
    kinds: dict[str, Any] = {}
    for network in CONFIG_NODES[node][1]:
        kinds |= get_type_hints(network.__init__)
    found = []
    for key, value in cfg.MODEL[node].items():
        name, full = key.lower(), f"MODEL.{node}.{key}"
        if value is None or name not in kinds:
            continue
        if not fits(value, kinds[name]):
            found.append(f"{full} must be {type_name(kinds[name])}, got {value!r}.")
        elif problem := range_problem(full, name, value):
            found.append(problem)
    return found


def value_of(cfg: CfgNode, key: str) -> Any:
    """Return the value of a dotted key."""
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node


class RecordingNode(CfgNode):
    """A config that records which of its keys are read.

    Args:
        node: config to copy.
        read: set to which the dotted keys are added.
        prefix: prefix of the keys of this node.
    """

    def __init__(self, node: CfgNode, read: set[str], prefix: str = "") -> None:
        super().__init__({}, new_allowed=node.is_new_allowed())
        self.__dict__["_read"], self.__dict__["_prefix"] = read, prefix
        for key, value in dict.items(node):
            nested = isinstance(value, CfgNode)
            dict.__setitem__(
                self, key, RecordingNode(value, read, f"{prefix}{key}.") if nested else value
            )

    def _note(self, key: Any) -> None:
        self.__dict__["_read"].add(f"{self.__dict__['_prefix']}{key}")

    def __getitem__(self, key: Any) -> Any:
        self._note(key)
        return dict.__getitem__(self, key)

    def get(self, key: Any, default: Any = None) -> Any:
        """Return a value, and record that it is read."""
        self._note(key)
        return dict.get(self, key, default)

    def items(self) -> ItemsView[Any, Any]:
        """Return all items, and record that they are read."""
        for key in self:
            self._note(key)
        return dict.items(self)

    def values(self) -> ValuesView[Any]:
        """Return all values, and record that they are read."""
        self.items()
        return dict.values(self)


def build_and_record(cfg: CfgNode, device: str) -> tuple[nn.Module, set[str]]:
    """Build the model of a config on a device, and return it with the keys that the run reads."""
    read: set[str] = set()
    model = build_model(RecordingNode(model_config(cfg, device), read))
    # Read by `apply_conventions` and by Detectron2, before the recording.
    read |= {"MODEL.CONVENTIONS", "MODEL.DEVICE", "VERSION"}
    recorded = RecordingNode(cfg, read)
    build_optimizer(recorded, model)
    train_arguments(recorded)
    test_arguments(recorded)
    yacs.read_schedule(recorded.SOLVER)
    yacs.read_options(recorded)
    read |= {"DATASETS.TEST", "OWN_DATA"}
    return model, read


def unread_problems(cfg: CfgNode, read: set[str]) -> list[str]:
    """Describe keys that were set to another value than their default, but that nothing reads."""
    default = yacs.default_config()
    found = []
    for key in cfg.GIVEN_KEYS:
        parents = {key.rsplit(".", k)[0] for k in range(1, key.count(".") + 1)}
        if (
            key in read
            or key.startswith("OWN_DATA")
            or (parents & read and in_open_section(default, key))
        ):
            continue
        value, usual = value_of(cfg, key), value_of(default, key)
        if value != usual and tuples_to_lists(value) != tuples_to_lists(usual):
            found.append(f"{key} has no effect: nothing in this recipe reads it. Remove it.")
    return found


def in_open_section(default: CfgNode, key: str) -> bool:
    """Tell whether a key is in a section that allows new keys."""
    node: Any = default
    for part in key.split(".")[:-1]:
        node = node[part]
        if node.is_new_allowed():
            return True
    return False


def tuples_to_lists(value: Any) -> Any:
    """Convert nested tuples to lists."""
    return [tuples_to_lists(item) for item in value] if isinstance(value, list | tuple) else value
