"""Say what to do when a config names a feature that a backbone does not have."""

from typing import NoReturn

from detectron2.layers import ShapeSpec


class FeatureShapes(dict[str, ShapeSpec]):
    """Channels and stride by name of the feature; an unknown name is explained."""

    def __missing__(self, name: str) -> NoReturn:
        text = f"This backbone has no feature {name!r}; it has {', '.join(self)}."
        if name.startswith("res"):
            text += f" {C4_ADVICE}"
        raise KeyError(text)


C4_ADVICE = (
    "Configs named C4 use the last stage of a ResNet as box head, and fit no other backbone: start "
    "from one with FPN, and set MODEL.BACKBONE.NAME to build_focalnet_fpn_backbone."
)
