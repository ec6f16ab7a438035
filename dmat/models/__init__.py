"""Classifiers as files: open, describe, import from other projects, export to them, predict logits."""
