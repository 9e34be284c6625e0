"""Build and call kernels in C++ for CPUs, and choose matrix products by measurement."""
