"""The block with the kernels in C++."""
