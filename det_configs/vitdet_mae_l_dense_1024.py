"""MAE's ViT-L as a detector at 1024 pixels, dense, trained from timm's weights."""

_base_ = ["_base_/vitdet_l_16_1024.py", "_base_/coco_1024.py", "_base_/schedule_60k.py"]
weights = dict(model="vit_large_patch16_224.mae", checkpoint="checkpoints/vit_large_patch16_224.mae.safetensors")
model = dict(backbone=weights)
