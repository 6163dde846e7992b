"""DINOv2 ViT-B as a detector at 1024 pixels, dense, trained from timm's weights."""

_base_ = ["_base_/vitdet_b_14_1024.py", "_base_/coco_1024.py", "_base_/schedule_60k.py"]
weights = dict(
    model="vit_base_patch14_dinov2.lvd142m", checkpoint="checkpoints/vit_base_patch14_dinov2.lvd142m.safetensors"
)
model = dict(backbone=weights)
