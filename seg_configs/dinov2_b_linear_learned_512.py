"""DINOv2 ViT-B with a linear head at 512 pixels: learned scorer and finer maps, for the dense model's checkpoint."""

_base_ = "dinov2_b_linear_dense_512.py"
model = dict(backbone=dict(**_base_.learned_14, map_scale=2))
