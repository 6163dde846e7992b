"""Baseline: merged patches are only resized; nothing to train."""

_base_ = "eva02_l_dense_1536.py"
model = dict(backbone=dict(**_base_.adaptive, merge="resizing"))
