"""Train and evaluate on instances: boxes, masks and keypoints."""
