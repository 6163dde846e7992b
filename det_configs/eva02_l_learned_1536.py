"""EVA-02-L at 1536 pixels: learned scorer and interpolated maps, for the dense model's checkpoint."""

_base_ = "eva02_l_dense_1536.py"
model = dict(backbone=_base_.learned)
