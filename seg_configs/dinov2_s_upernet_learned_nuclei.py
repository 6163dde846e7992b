"""Learned scorer, and merged patches read at their own resolution, for the dense model's checkpoint; neither is trained
with labels."""

_base_ = "dinov2_s_upernet_dense_nuclei.py"
model = dict(
    own_resolution=True,
    backbone={**_base_.learned, "scorer": "checkpoints/nuclei_upernet_scorer.safetensors"},
)
