"""Give the backbones to models of transformers, such as UperNet and Mask2Former."""

import dataclasses
from typing import Any

from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from ..backbones import build_backbone, variant
from ..backbones.stages import feature_names

MODEL_TYPE = "focalnet_det"


class FocalBackboneConfig(BackboneConfigMixin, PreTrainedConfig):
    """Config of a backbone: a variant, and constructor arguments that differ from it.

    Args:
        variant: name, see :func:`focalnet_det.list_backbones`.
        overrides: constructor arguments, such as ``{"drop_path_rate": 0.3}``; None for none.
        out_features: names of the features, ``stage1`` .. ``stage4`` with strides 4, 8, 16 and 32;
            None for all. (``FocalNetBackbone`` of transformers begins at stride 8.)
        out_indices: or their positions.
    Raises: KeyError for an unknown variant, ValueError for unknown features.
    """

    model_type = MODEL_TYPE

    variant: str = "focalnet_tiny_srf"
    overrides: dict[str, Any] | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        row = dataclasses.asdict(variant(self.variant)) | (self.overrides or {})
        self.stage_names = list(feature_names(len(row["depths"]), row.get("patch_size", 4)))
        features = kwargs.pop("out_features", None)
        indices = kwargs.pop("out_indices", None)
        # Derived from the variant, so that a saved list cannot contradict it.
        kwargs.pop("stage_names", None)
        if features is None and indices is None:
            features = list(self.stage_names)
        self.set_output_features_output_indices(
            out_features=None if features is None else list(features), out_indices=indices
        )
        super().__post_init__(**kwargs)


class FocalBackbone(BackboneMixin, PreTrainedModel):
    """A backbone with the interface of transformers; ``network`` is ours, with its names.

    Weights are loaded into it with ``load_pretrained(model.network, FILE)``, saved and read with
    ``save_pretrained`` and ``FocalBackbone.from_pretrained``: ``AutoBackbone.from_pretrained`` of
    transformers 5 looks for folders on the hub alone.

    Args:
        config: of the backbone.
    """

    config_class = FocalBackboneConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"
    has_attentions = False

    def __init__(self, config: FocalBackboneConfig) -> None:
        super().__init__(config)
        overrides = dict(config.overrides or {})
        self.network = build_backbone(
            config.variant, out_features=tuple(config.out_features), **overrides
        )
        # Of all stages, also of those that are not built.
        width = self.network.shapes[self.network.stage_names[0]].channels
        self.num_features = [width * 2**i for i in range(len(self.stage_names))]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the parameters as the constructors initialized them."""

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,  # noqa: ARG002
        output_attentions: bool | None = None,  # noqa: ARG002
        return_dict: bool | None = None,
        **_: Any,
    ) -> BackboneOutput | tuple[tuple[Tensor, ...]]:
        """Compute the features of a batch of images.

        Args:
            pixel_values: (N, in_channels, H, W), normalized.
            output_hidden_states, output_attentions: no effect: only feature maps are kept.
            return_dict: False for a tuple.
        Returns: feature maps (N, C, ceil(H / stride), ceil(W / stride)) of ``out_features``.
        """
        features = self.network(pixel_values)
        maps = tuple(features[name] for name in self.out_features)
        if return_dict is False:
            return (maps,)
        return BackboneOutput(feature_maps=maps, hidden_states=None, attentions=None)


AutoConfig.register(MODEL_TYPE, FocalBackboneConfig, exist_ok=True)
AutoBackbone.register(FocalBackboneConfig, FocalBackbone, exist_ok=True)
