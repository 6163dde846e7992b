"""DINOv2 ViT-S with a linear head at 512 pixels, dense, trained from timm's weights."""

_base_ = ["_base_/linear_512.py", "_base_/ade20k_512.py", "_base_/schedule_linear_80k.py"]
weights = dict(
    model="vit_small_patch14_dinov2.lvd142m",
    checkpoint="checkpoints/vit_small_patch14_dinov2.lvd142m.safetensors",
    img_size=518,
)
model = dict(backbone=weights, decode_head=dict(in_channels=384, channels=384))
