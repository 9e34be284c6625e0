"""Exchange models with Hugging Face transformers; importing it registers our AutoBackbone."""

from .auto_backbone import FocalBackbone, FocalBackboneConfig
from .saved_models import load_huggingface, save_huggingface

__all__ = ["FocalBackbone", "FocalBackboneConfig", "load_huggingface", "save_huggingface"]
