"""Baseline: merged patches are only resized; nothing to train."""

_base_ = "eva02_l_dense_1536.py"
model = dict(backbone=dict(thresholds={32: 2.0, 64: 2.0, 128: 0.3}, merge="resizing"))
