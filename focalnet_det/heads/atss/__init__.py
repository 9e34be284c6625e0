"""Define ATSS, a dense detector that selects its training samples by their statistics."""

from .atss import ATSS
from .atss_head import ATSSHead
from .atss_matcher import ATSSMatcher

__all__ = ["ATSS", "ATSSHead", "ATSSMatcher"]
