"""One self-contained HTML page per evaluation."""

from .build import write_report

__all__ = ["write_report"]
