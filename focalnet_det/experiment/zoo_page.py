"""Write the tables of the model zoo: one row per config, counted on the model that it builds."""

import re
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from ..analysis import analyze_backbone
from ..analysis.segmentor_flops import segmentor_macs
from ..atomic import write_text
from ..backbones import StagedBackbone
from ..checkpoint.zoo import WEIGHTS
from ..heads.mmdet.segmentor import MmsegSegmentor
from ..resources import list_configs, resource_folder
from .description import load_config, read_experiment, register_all

# The tables stand between these lines of the page.
BEGIN, END = "<!-- begin: focalnet-det configs --zoo-page -->", "<!-- end -->"
# Sizes for which published FLOPs are given, (height, width), pixels.
DETECTION_SIZE, SEGMENTATION_SIZE = (800, 1280), (512, 2048)
CLASSIFICATION_SIZE = (224, 224)
# Multiply-accumulates of the backbones that were counted, by the shapes of their parameters.
COUNTED: dict[tuple[tuple[int, ...], ...], int] = {}
HEAD = """| config | published score | parameters | MACs | starts from |
|---|---|---|---|---|
"""
_SCORE = re.compile(
    r"published ((?:box AP|mIoU|top-1).*?)\.(?:$| [A-Z])|([\d.]+ (?:PQ|mIoU)) is published"
)


def update_zoo_page(path: Path) -> None:
    """Replace the tables of a page.

    Raises: ValueError if the page lacks the lines between which they stand.
    """
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} has no lines {BEGIN!r} and {END!r}, between which tables stand.")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    write_text(path, f"{before}{BEGIN}\n\n{''.join(zoo_tables())}\n{END}{after}")


def zoo_tables() -> Iterator[str]:
    """Yield the Markdown table of each folder of configs, with its title."""
    register_all()
    configs = list_configs()
    for folder in sorted({name.split("/")[0] for name in configs}):
        yield f"### {folder}\n\n{HEAD}"
        yield from (zoo_row(n, text) for n, text in configs.items() if n.startswith(f"{folder}/"))
        yield "\n"


def zoo_row(name: str, text: str) -> str:
    """Return the row of a config.

    Args:
        name: path below ``configs``.
        text: of its header, see :func:`focalnet_det.resources.list_configs`.
    """
    experiment = read_experiment(load_config(resource_folder("configs") / name, []))
    model, _ = experiment.skeleton()
    model.eval()
    title = text.split(". ")[0].split(":")[0].split(" (see ")[0].removesuffix(".")
    cells = [
        f"[{title}](../configs/{name})",
        published_score(text) or "–",
        f"{parameter_count(model) / 1e6:.1f} M",
        _macs(model, name),
        starting_weights(name),
    ]
    return f"| {' | '.join(cells)} |\n"


def published_score(text: str) -> str:
    """Return the score that the header of a config names, "" if none is published."""
    found = _SCORE.search(text)
    return "" if found is None else next(group for group in found.groups() if group)


def parameter_count(model: nn.Module) -> int:
    """Count the parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def _macs(model: nn.Module, name: str) -> str:
    if isinstance(model, MmsegSegmentor):
        return f"{sum(segmentor_macs(model, SEGMENTATION_SIZE)) / 1e9:.0f} G"
    for module in model.modules():
        if isinstance(module, StagedBackbone):
            if "Classification/" in name or "Pretraining/" in name:
                cost = analyze_backbone(module, CLASSIFICATION_SIZE)
                return f"backbone {cost.macs / 1e9:.1f} G at 224 x 224"
            return f"backbone {_backbone_macs(module) / 1e9:.0f} G"
    return "–"


def _backbone_macs(net: StagedBackbone) -> int:
    """Count a backbone once: many configs have the same one."""
    shapes = tuple(tuple(parameter.shape) for parameter in net.parameters())
    if shapes not in COUNTED:
        COUNTED[shapes] = analyze_backbone(net, DETECTION_SIZE).macs
    return COUNTED[shapes]


def starting_weights(name: str) -> str:
    """Return the registered name of public weights to start from, "–" without any.

    Args:
        name: of the config, which names its variant.
    """
    stem = name.split("/")[1]
    for weights, row in WEIGHTS.items():
        if re.search(rf"(^|_){row.variant}(_|\.)", stem):
            return f"`{weights}`"
    return "–"
