"""Kernels in C++ for CPUs, and matrix products by measurement."""
