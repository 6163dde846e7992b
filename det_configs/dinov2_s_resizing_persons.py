"""Adaptive patches by entropy, for the dense model's checkpoint; the learned scorer is distilled from it, too."""

_base_ = "dinov2_s_dense_persons.py"
model = dict(backbone=dict(**_base_.adaptive, merge="resizing"))
