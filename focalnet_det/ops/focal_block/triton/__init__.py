"""Run the block with Triton kernels, for GPUs."""
