"""Run a block fast: one policy table, weights, autograd, and a folder for each backend."""
