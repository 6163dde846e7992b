"""Learned scorer and interpolated maps, neither trained with labels: for the dense model's checkpoint, or to train
heads that know merged patches."""

_base_ = "dinov2_s_dense_persons.py"
model = dict(backbone=_base_.learned)
