"""Baseline: merged patches are only resized; nothing to train."""

_base_ = "eva02_tiny_dense_photoshapes.py"
model = dict(backbone=dict(thresholds={16: 3.8, 32: 3.2}, merge="resizing"))
