"""Read, convert and register panoptic datasets in COCO's format."""
