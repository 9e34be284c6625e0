"""Checks of a yacs config: values, and keys that nothing reads."""

from collections.abc import ItemsView, ValuesView
from typing import Any, get_type_hints

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..detectron2.backbone import CONFIG_NODES
from . import yacs
from .rules import YACS_RULES, range_problem
from .values import fits, type_name
from .yacs_parts import build_optimizer, model_config, test_arguments, train_arguments


def problems(cfg: CfgNode) -> list[str]:
    """Return what is wrong with values, one sentence each."""
    found = []
    for key, name in YACS_RULES.items():
        if problem := range_problem(key, name, value_of(cfg, key)):
            found.append(problem)
    means, stds = len(cfg.MODEL.PIXEL_MEAN), len(cfg.MODEL.PIXEL_STD)
    if means != stds:
        found.append(f"MODEL.PIXEL_MEAN has {means} values, MODEL.PIXEL_STD {stds}.")
    names = cfg.SOLVER.NO_DECAY_NAMES
    if not all(isinstance(name, str) for name in names):
        found.append(f"SOLVER.NO_DECAY_NAMES must be a list of texts, got {list(names)}.")
    return found + [problem for name in CONFIG_NODES for problem in backbone_problems(cfg, name)]


def backbone_problems(cfg: CfgNode, node: str) -> list[str]:
    """Return what is wrong with values of a backbone's keys, ``MODEL.FOCALNET`` or another."""
    # These keys have no default value, whose type Detectron2 would compare.
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
    """A config that notes which of its keys are read.

    Args:
        node: to record.
        read: gets the dotted keys.
        prefix: of the keys of this node.
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
        """Return a value, noted as read."""
        self._note(key)
        return dict.get(self, key, default)

    def items(self) -> ItemsView[Any, Any]:
        """Return all items, noted as read."""
        for key in self:
            self._note(key)
        return dict.items(self)

    def values(self) -> ValuesView[Any]:
        """Return all values, noted as read."""
        self.items()
        return dict.values(self)


def build_and_record(cfg: CfgNode, device: str) -> tuple[nn.Module, set[str]]:
    """Return the model of a config on a device, and the keys that it and the run read."""
    read: set[str] = set()
    model = build_model(RecordingNode(model_config(cfg, device), read))
    # Read where parts take the place of Detectron2's.
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
    """Return a sentence for every key that was set, to another value than its default, in vain."""
    default = yacs.default_config()
    found = []
    for key in cfg.GIVEN_KEYS:
        parents = {key.rsplit(".", k)[0] for k in range(1, key.count(".") + 1)}
        if key in read or key.startswith("OWN_DATA") or (parents & read and is_free(default, key)):
            continue
        value, usual = value_of(cfg, key), value_of(default, key)
        if value != usual and list_of(value) != list_of(usual):
            found.append(f"{key} has no effect: nothing in this recipe reads it. Leave it out.")
    return found


def is_free(default: CfgNode, key: str) -> bool:
    """Return whether a key lies in a section that takes any keys."""
    node: Any = default
    for part in key.split(".")[:-1]:
        node = node[part]
        if node.is_new_allowed():
            return True
    return False


def list_of(value: Any) -> Any:
    """Return tuples as lists."""
    return [list_of(item) for item in value] if isinstance(value, list | tuple) else value
