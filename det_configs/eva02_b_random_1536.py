"""Baseline: as many base patches dropped at random as adaptive patches would save; nothing to train."""

_base_ = "eva02_b_dense_1536.py"
model = dict(backbone=dict(thresholds={32: 2.0, 64: 2.0, 128: 0.3}, merge="random"))
