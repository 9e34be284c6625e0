"""UPerNet for small data on a backbone of Hugging Face: a config of one's own.

focalnet-det train --config-file examples/upernet_convnextv2_huggingface.py --sem-images train ...
"""

from detectron2.config import LazyCall as L

from focalnet_det.detectron2.library_backbones import huggingface_backbone
from focalnet_det.experiment import recipe

base = recipe("ADE20K-SemanticSegmentation/upernet_focalnet_nano_small.py")
model, dataloader, train = base.model, base.dataloader, base.train
optimizer, schedule = base.optimizer, base.schedule

# With pretrained=True, name is a model on the hub or a folder.
sizes = {"depths": [2, 2, 6, 2], "hidden_sizes": [48, 96, 192, 384]}
model.backbone = L(huggingface_backbone)(name="convnextv2", **sizes)
