"""Run the block in plain PyTorch: fused branches, tile by tile."""
