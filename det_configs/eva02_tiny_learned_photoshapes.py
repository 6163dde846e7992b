"""Learned scorer and interpolated maps, for the dense model's checkpoint; nothing is trained with labels."""

_base_ = "eva02_tiny_dense_photoshapes.py"
model = dict(backbone=_base_.learned)
