"""Read checkpoint files without running anything that is in them."""
