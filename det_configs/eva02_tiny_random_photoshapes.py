"""Baseline: as many base patches dropped at random as adaptive patches would save; nothing to train."""

_base_ = "eva02_tiny_dense_photoshapes.py"
model = dict(backbone=dict(scorer="laplacian", thresholds={16: 0.0155, 32: 0.0046}, merge="random"))
