"""DINOv3 ViT-B with a linear head at 512 pixels: learned scorer and finer maps, for the dense model's checkpoint."""

_base_ = "dinov3_b_linear_dense_512.py"
model = dict(backbone=dict(**_base_.learned, map_scale=2))
