"""Read checkpoint files without executing their content."""
