"""The typed part of a config: all that data, the command line and the rules of length decide."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .options import TrainOptions
from .own_data import OwnData
from .solver import Schedule


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The numbers of a model that follow from data.

    Attributes:
        classes: of boxes, masks or pixels; of a panoptic model, its things. None if not known.
        stuff: of a panoptic model, classes of the semantic head; None for other models.
        unified: whether things and stuff have one numbering, which ``classes`` counts.
        things: of such a model, the classes that are instances; None for all.
        keypoints: per object, None for a model without keypoints.
        detections: predictions per image, None if there is no such limit.
        weighted: whether the loss takes weights for the classes.
        class_weights: of the loss, None for equal ones.
    """

    classes: int | None = None
    stuff: int | None = None
    unified: bool = False
    things: tuple[int, ...] | None = None
    keypoints: int | None = None
    detections: int | None = None
    weighted: bool = False
    class_weights: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that both kinds of config have, in one form.

    Attributes:
        train_sets, test_sets: names of registered data sets.
        batch_size: images per iteration, over all processes.
        learning_rate: of the optimizer, for this batch.
        masks: whether instance masks are trained.
        own_data: files of the user's that the sets were registered from, None for none.
    """

    model: ModelSettings
    train_sets: tuple[str, ...]
    test_sets: tuple[str, ...]
    batch_size: int
    learning_rate: float
    schedule: Schedule
    options: TrainOptions
    masks: bool = True
    own_data: OwnData | None = None


@dataclass(frozen=True)
class Given:
    """Settings that the command line overrides, and how a config calls them.

    Attributes:
        names: such as "length", "milestones", "learning_rate", or the name of an option.
        keys: name -> key of the config.
        assign: how an override is written, such as "{key}={value}".
        none: how no value is written.
    """

    names: frozenset[str] = frozenset()
    keys: Mapping[str, str] = field(default_factory=dict)
    assign: str = "{key}={value}"
    none: str = "null"

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def key(self, name: str) -> str:
        """Return the key of a setting."""
        return self.keys.get(name, name)

    def override(self, name: str, value: Any) -> str:
        """Return the override that sets a value."""
        return self.assign.format(key=self.key(name), value=value)
