"""A classifier as a file: opened, described, taken in from other projects, given out to them, asked for logits."""
