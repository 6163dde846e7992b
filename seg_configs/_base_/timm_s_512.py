"""A ViT-S of timm + UperNet at 512 pixels."""

_base_ = "timm_b_512.py"
model = dict(
    backbone=dict(model="vit_small_patch14_dinov2.lvd142m"),
    neck=dict(embed_dim=384),
    decode_head=dict(in_channels=[384, 384, 384, 384], channels=512),
    auxiliary_head=dict(in_channels=384),
)
