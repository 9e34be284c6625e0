"""The block with Triton kernels, for GPUs."""
