"""Finds what is wrong with a data set, says how to mend it, and mends what is safe."""
