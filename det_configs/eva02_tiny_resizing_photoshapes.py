"""Baseline: merged patches are only resized; nothing to train."""

_base_ = "eva02_tiny_dense_photoshapes.py"
model = dict(backbone=dict(**_base_.adaptive, merge="resizing"))
