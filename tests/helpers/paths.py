"""Folders of the checkout, and the data beside it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
TOOLS = ROOT / "tools"
# Small real data sets and stored outputs of official code; tests skip where they are missing.
SHARED = ROOT.parent / "shared"
