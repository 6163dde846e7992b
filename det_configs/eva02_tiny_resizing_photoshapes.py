"""Baseline: merged patches are only resized; nothing to train."""

_base_ = "eva02_tiny_dense_photoshapes.py"
model = dict(backbone=dict(thresholds={16: 5.0, 32: 5.0}, merge="resizing"))
