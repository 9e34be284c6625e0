"""Fast forms of a block: one policy table, weights, autograd, and a folder for each backend."""
