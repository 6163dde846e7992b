"""Learned scorer and interpolated maps, for the dense model's checkpoint; the scorer is that of the linear head."""

_base_ = "dinov2_s_upernet_dense_receipts.py"
model = dict(backbone=_base_.learned)
