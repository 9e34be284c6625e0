"""Write a self-contained HTML report of an evaluation."""

from .write_report import write_report

__all__ = ["write_report"]
