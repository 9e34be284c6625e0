"""Use what was trained: predictions for images, folders and videos. Needs Detectron2."""

from .prediction import Prediction
from .predictor import Predictor

__all__ = ["Prediction", "Predictor"]
