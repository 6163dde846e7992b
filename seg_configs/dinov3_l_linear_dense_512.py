"""DINOv3 ViT-L with a linear head at 512 pixels, dense, trained from timm's weights."""

_base_ = ["_base_/linear_512.py", "_base_/ade20k_512.py", "_base_/schedule_linear_80k.py"]
weights = dict(
    model="vit_large_patch16_dinov3.lvd1689m", checkpoint="checkpoints/vit_large_patch16_dinov3.lvd1689m.safetensors"
)
model = dict(backbone=weights, decode_head=dict(in_channels=1024, channels=1024))
