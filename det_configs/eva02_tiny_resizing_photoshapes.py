"""Baseline: merged patches are only resized; nothing to train."""

_base_ = "eva02_tiny_dense_photoshapes.py"
model = dict(backbone=dict(scorer="laplacian", thresholds={16: 0.0155, 32: 0.0046}, merge="resizing"))
