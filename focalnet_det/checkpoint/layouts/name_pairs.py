"""Rename whole state dicts by a table of pairs: one name of ours, one or more of a public file."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .swin_resnet import find_peer_family, translate_peer
from .tables import PAIR
from .translate import translate

# Our name -> names in the file: the first is that of the parameter, the others repeat its tensor.
NamePairs = dict[str, tuple[str, ...]]


class Split(NamedTuple):
    """Tensors of a model: backbone in our names, and the others.

    Attributes:
        backbone: by names of the network.
        others: by their names in the file.
    """

    backbone: dict[str, Tensor]
    others: dict[str, Tensor]


def pairs(modules: Mapping[str, Iterable[str]]) -> NamePairs:
    """Return the pairs of weights and biases of modules: our module -> theirs."""
    return {
        f"{ours}.{part}": tuple(f"{name}.{part}" for name in theirs)
        for ours, theirs in modules.items()
        for part in PAIR
    }


def split_backbone(state: Mapping[str, Tensor]) -> Split:
    """Take the backbone out of a whole model.

    Raises: ValueError if a name of the backbone is unknown.
    """
    translation = translate_peer(state) or translate(state)
    if translation.unknown:
        raise ValueError(f"{translation.unknown[0]} is no name of a {translation.layout} backbone.")
    others = translation.others
    if not translation.backbone:
        others = dict(state)
    return Split(translation.backbone, others)


def read_names(others: Mapping[str, Tensor], table: NamePairs, title: str) -> dict[str, Tensor]:
    """Return tensors by our names.

    Args:
        others: of a file, by their names there.
        table: of all names that the file may have; it need not have repetitions.
        title: of the layout, for messages.
    Raises: ValueError if a name is missing or unknown, or repetitions differ.
    """
    known = {name for names in table.values() for name in names}
    unknown = [name for name in others if name not in known]
    if unknown:
        raise ValueError(
            f"{len(unknown)} names of this file have no place in {title}, such as {unknown[0]}."
        )
    result = {}
    for ours, names in table.items():
        present = [name for name in names if name in others]
        if not present:
            raise ValueError(f"{names[0]} is missing: this file is no whole {title}.")
        first = others[present[0]]
        for name in present[1:]:
            if not torch.equal(others[name], first):
                raise ValueError(f"{name} and {present[0]} differ, and are one tensor in {title}.")
        result[ours] = first
    return result


def write_names(ours: Mapping[str, Tensor], table: NamePairs, title: str) -> dict[str, Tensor]:
    """Return tensors by the names of a public file, repetitions included.

    Raises: ValueError if the file has no name for a tensor.
    """
    unknown = [name for name in ours if name not in table]
    if unknown:
        raise ValueError(f"{unknown[0]} has no place in files of {title}.")
    return {name: tensor for n, tensor in ours.items() for name in table[n]}


def focal_backbone(
    state: Mapping[str, Tensor], title: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return backbone and other tensors of a model saved here, for writing.

    Raises: ValueError if the backbone is neither FocalNet nor Focal Transformer.
    """
    if find_peer_family(state) is not None:
        raise ValueError(
            f"Files of {title} are written with a FocalNet or a Focal Transformer alone: its names "
            "of other backbones are not those of this package."
        )
    inside = {n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}
    return inside, {n: t for n, t in state.items() if not n.startswith("backbone.")}


def count(names: Iterable[str], prefix: str) -> int:
    """Return how many numbers follow a prefix, such as those of layers."""
    return len({n.removeprefix(prefix).partition(".")[0] for n in names if n.startswith(prefix)})
