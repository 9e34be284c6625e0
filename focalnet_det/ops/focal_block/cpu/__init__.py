"""Run the block with the kernels in C++."""
