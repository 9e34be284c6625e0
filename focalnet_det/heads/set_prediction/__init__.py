"""Parts that Mask2Former, DINO and other detectors that predict a set have in common."""
