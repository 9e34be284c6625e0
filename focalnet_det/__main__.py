"""Run ``python -m focalnet_det``, which is ``focalnet-det``."""

from .command_line import main

main()
