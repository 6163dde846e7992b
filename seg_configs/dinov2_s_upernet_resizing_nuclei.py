"""Adaptive patches by entropy, for the dense model's checkpoint; the learned scorer is distilled from it, too."""

_base_ = "dinov2_s_upernet_dense_nuclei.py"
model = dict(own_resolution=True, backbone=dict(**_base_.adaptive, merge="resizing", map_fill="interpolate"))
