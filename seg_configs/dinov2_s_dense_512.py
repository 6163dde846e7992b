"""DINOv2 ViT-S + UperNet at 512 pixels, dense, trained from timm's weights."""

_base_ = ["_base_/timm_s_512.py", "_base_/ade20k_512.py", "_base_/schedule_80k.py"]
weights = dict(
    model="vit_small_patch14_dinov2.lvd142m",
    checkpoint="checkpoints/vit_small_patch14_dinov2.lvd142m.safetensors",
    img_size=518,
)
model = dict(backbone=weights)
