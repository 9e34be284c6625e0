"""Export trained models to ONNX and ``torch.export``, verified against the original."""

from .verify_graph import ExportError
from .write_graph import ExportReport, export_model

__all__ = ["ExportError", "ExportReport", "export_model"]
