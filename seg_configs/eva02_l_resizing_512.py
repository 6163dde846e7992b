"""Baseline: merged patches are only resized; nothing to train."""

_base_ = "eva02_l_dense_512.py"
model = dict(backbone=dict(thresholds={32: 5.75}, merge="resizing"))
