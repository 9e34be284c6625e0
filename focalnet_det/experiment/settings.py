"""Define the settings that data, the command line and the training length determine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .options import TrainOptions
from .own_data import OwnData
from .solver import Schedule


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Settings of a model that depend on data.

    Attributes:
        classes: number of classes; for a panoptic model, of things. None if unknown.
        stuff: for a panoptic model, number of classes of the semantic head; None for others.
        unified: things and stuff are numbered together, and ``classes`` counts both.
        things: for such a model, the classes that are instances; None for all.
        keypoints: number of keypoints per object, None for a model without keypoints.
        detections: largest number of predictions per image, None for no limit.
        weighted: the loss accepts class weights.
        class_weights: class weights of the loss, None for equal ones.
        conventions: of a DINO, "auto" for those of its initial weights; None for other models.
    """

    classes: int | None = None
    stuff: int | None = None
    unified: bool = False
    things: tuple[int, ...] | None = None
    keypoints: int | None = None
    detections: int | None = None
    weighted: bool = False
    class_weights: tuple[float, ...] | None = None
    conventions: str | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run that both kinds of config have.

    Attributes:
        model: settings of the model.
        train_sets, test_sets: names of registered data sets.
        batch_size: images per iteration, over all processes.
        learning_rate: base learning rate for this batch size.
        schedule: length of the training and course of the learning rate.
        options: options of the run.
        masks: instance masks are trained.
        own_data: the user's own data sets that these names belong to, None if there are none.
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
    """Settings that the command line overrides, and their keys in a config.

    Attributes:
        names: names of settings, such as "length", "learning_rate", or the name of an option.
        keys: name -> key of the config.
        assign: format of an override, such as "{key}={value}".
        none: value of an override that means None.
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
        """Return the override that sets a value, as written on the command line."""
        return self.assign.format(key=self.key(name), value=value)
