"""One self-contained HTML page per evaluation."""

from .write_report import write_report

__all__ = ["write_report"]
