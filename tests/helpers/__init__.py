"""What several test files share: oracles, small inputs and models, comparisons, and processes."""
