"""The same network, small enough to train on two CPU cores: patch 4, crops of 80 pixels, two classes."""

_base_ = "eva02_l_512.py"
norm_cfg = dict(type="BN", requires_grad=True)
crop_size = (80, 80)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        img_size=80,
        pretrain_img_size=80,
        patch_size=4,
        embed_dim=64,
        depth=4,
        num_heads=2,
        drop_path_rate=0.0,
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(embed_dim=64, rescales=[2, 1, 0.5, 0.25], norm_cfg=norm_cfg),
    decode_head=dict(in_channels=[64, 64, 64, 64], channels=32, num_classes=2, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=64, channels=32, num_classes=2, norm_cfg=norm_cfg),
    test_cfg=dict(crop_size=crop_size, stride=(53, 53), token_budget=4096),
)
