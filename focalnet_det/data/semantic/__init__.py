"""Read, augment and register datasets of semantic segmentation."""
