"""EVA-02-L + UperNet at 512 pixels: learned scorer and interpolated maps, for the dense model's checkpoint."""

_base_ = "eva02_l_dense_512.py"
model = dict(backbone=_base_.learned)
