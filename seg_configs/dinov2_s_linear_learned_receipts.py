"""Learned scorer and interpolated maps, for the dense model's checkpoint; neither is trained with labels."""

_base_ = "dinov2_s_linear_dense_receipts.py"
model = dict(backbone=_base_.learned)
