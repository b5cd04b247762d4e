"""What all parts of segmentation share, and datasets of masks with it."""

IGNORED = 255  # value of a pixel that does not count
